"""What pretrained models consist of, on a disk or on the Hugging Face hub."""

import contextlib
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from vla import InputError, in_one_line
from vla.config import ModelConfig


class Originals:
    """Reads the models that --model.backbone, or vision_backbone and language_backbone, name.

    All but their weights is kept as it is used, so that `save` can write it beside the policy.
    saved: a folder of `save`, read in place of them. weights: if false, parameters are left as the memory was.
    """

    def __init__(self, settings: ModelConfig, saved: Path | None, weights: bool):
        self.settings, self.saved, self.weights = settings, saved, weights
        self.parts: dict[str, list] = {}  # by flag
        self.code: dict[str, dict[str, bytes]] = {}  # the files of each flag's folder that trust_remote_code runs
        self.digest = ""  # of the weights that were loaded

    def __str__(self) -> str:
        settings, random = self.settings, "random " * self.settings.random_backbone
        return random + (settings.backbone or f"{settings.vision_backbone} and {settings.language_backbone}")

    def _read(self, flag: str, what: str, read):
        """What `read` makes of the folder or name of a model. Raises InputError if it fails."""
        name = getattr(self.settings, flag)
        if self.saved and what != "weights":
            name = str(_place(self.saved, flag))
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            cure = f"give the one where it lies now (of an export: --{flag}, or from_pretrained(…, {flag}=…))"
            raise InputError(f"--model.{flag} {name}: there is no such folder; {cure}")
        try:
            return read(name)
        except Exception as failure:  # by every kind of damage and of network another one
            reason = in_one_line(failure)
            if "attn_implementation" in reason:  # Gemma 2 in PaliGemma 2
                problem = f"has no attention of the kind {self.settings.attention}; give --model.attention eager"
                raise InputError(f"--model.{flag} {name} {problem}") from None
            raise InputError(
                f"--model.{flag} {name}: {what} cannot be read ({reason}); give a folder of a transformers model, or "
                "owner/name on the Hugging Face hub"
            ) from None

    def config(self, flag: str):
        """The configuration of a model, which may be changed before `model` is called."""
        from transformers import AutoConfig

        trust = self.settings.trust_remote_code

        def read(name: str):
            if trust:  # now, as the folder may be gone when it is saved; transformers saves the configuration's alone
                self.code[flag] = {file.name: file.read_bytes() for file in Path(name).glob("*.py")}
            return AutoConfig.from_pretrained(name, trust_remote_code=trust)

        config = self._read(flag, "config.json", read)
        self.parts.setdefault(flag, []).append(config)
        return config

    def processor(self, flag: str) -> dict:
        """What its image processor does, as preprocessor_config.json says it."""
        from transformers.utils import cached_file

        def read(name: str) -> dict:
            options = {"_raise_exceptions_for_missing_entries": False}
            if path := cached_file(name, "preprocessor_config.json", **options):
                return json.loads(Path(path).read_text())
            return json.loads(Path(cached_file(name, "processor_config.json")).read_text())["image_processor"]

        self.parts[flag].append(read := self._read(flag, "preprocessor_config.json", read))
        return read

    def tokenizer(self, flag: str, marks: tuple[str, ...]):
        """The tokenizer of a model. Raises InputError if one of these marks is no token of it."""
        from transformers import AutoTokenizer

        trust = self.settings.trust_remote_code
        read = self._read(flag, "tokenizer", lambda name: AutoTokenizer.from_pretrained(name, trust_remote_code=trust))
        if missing := sorted(set(marks) - set(read.get_vocab())):
            raise InputError(
                f"the tokenizer of --model.{flag} {getattr(self.settings, flag)} has no token {', '.join(missing)}, "
                "which stands around images or instructions; put the tokenizer there that belongs to the model"
            )
        self.parts[flag].append(read)
        return read

    def model(self, flag: str, auto, config) -> nn.Module:
        """A model in float32, by one of transformers' Auto classes. Raises InputError if weights are missing."""
        from transformers.initialization import no_init_weights
        from transformers.utils import logging

        name, settings = getattr(self.settings, flag), self.settings
        options = {"attn_implementation": settings.attention, "dtype": torch.float32}
        options["trust_remote_code"] = settings.trust_remote_code
        for jitter in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
            if hasattr(config, jitter):  # DINOv3 in training moves its positions at random, by no key of a sample
                setattr(config, jitter, None)
        if hasattr(config, "vision_config") and flag == "vision_backbone":
            config.vision_config.vision_use_head = False  # SigLIP's, for the whole image; patches are all we take
        if not self.weights or settings.random_backbone:
            with contextlib.nullcontext() if self.weights else no_init_weights():
                made = self._read(flag, "architecture", lambda _: auto.from_config(config, **options))
            made.tie_weights()  # which may have been left out
            return _drop_nothing(made)
        options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
        logging.set_verbosity_error()  # what it says of weights that were cut off, and its bar, are of no use here
        logging.disable_progress_bar()
        made, found = self._read(flag, "weights", lambda name: auto.from_pretrained(name, **options))
        if lacking := sorted(found["missing_keys"]) + [key for key, *_ in sorted(found["mismatched_keys"])]:
            raise InputError(
                f"--model.{flag} {name} lacks weights or has them in another shape, {', '.join(lacking[:3])}"
                f"{f' and {len(lacking) - 3} more' * (len(lacking) > 3)}, which would stay random: give the whole "
                "model (or --model.random_backbone if random is what you want)"
            )
        with ThreadPoolExecutor() as threads:  # gigabytes
            hashes = threads.map(_sha256, made.parameters())
            lines = [f"{key} {one}" for (key, _), one in zip(made.named_parameters(), hashes, strict=True)]
        self.digest = hashlib.sha256("\n".join([self.digest, *lines]).encode()).hexdigest()
        return _drop_nothing(made)

    def save(self, folder: Path) -> None:
        """Write configurations, tokenizers, image processors and code, but no weights. The folder is replaced whole."""
        temporary = folder.with_name(f".writing_{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        for flag, parts in self.parts.items():
            for part in parts:
                place = _place(temporary, flag)
                if isinstance(part, dict):
                    place.mkdir(parents=True, exist_ok=True)
                    (place / "preprocessor_config.json").write_text(json.dumps(part, indent=2) + "\n")
                else:
                    part.save_pretrained(place)
            for name, content in self.code.get(flag, {}).items():
                (place / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _drop_nothing(model: nn.Module) -> nn.Module:
    """The model without dropout, stochastic depth and layers left out at random, which know no key of a sample."""
    for module in model.modules():
        for place in (module, getattr(module, "config", module)):  # some read it there at each call
            for name, value in [*getattr(place, "__dict__", {}).items()]:  # code of a model may keep a plain dict
                dropout = "drop" in name or (name == "p" and "Dropout" in type(module).__name__)
                if dropout and isinstance(value, float):
                    setattr(place, name, 0.0)
    return model


def _sha256(parameter: nn.Parameter) -> str:
    return hashlib.sha256(parameter.detach().contiguous().numpy().data).hexdigest()


def _place(folder: Path, flag: str) -> Path:
    return folder if flag == "backbone" else folder / flag
