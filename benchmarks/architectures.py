"""Pretrained models as they are on the hub but for their weights: configuration, image processor and a small tokenizer.

    python benchmarks/architectures.py smolvlm2-500m /tmp/smolvlm2-500m

With --model.random_backbone, a policy on such a folder costs what one on the real model costs. Sizes are those of the
configurations of HuggingFaceTB/SmolVLM2-500M-Video-Instruct, google/paligemma-3b-pt-224, Qwen/Qwen2.5-VL-3B-Instruct.
"""

import json
import sys
from pathlib import Path

from launched import ROOT

sys.path.append(str(ROOT / "tests"))
import tiny

REAL = {
    "smolvlm2-500m": {
        "family": "smolvlm",
        "config": {"scale_factor": 4},
        "text_config": {
            **{"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
            **{"num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192},
        },
        "vision_config": {
            **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
            **{"image_size": 512, "patch_size": 16},
        },
        "processor": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    },
    "paligemma-3b": {
        "family": "paligemma",
        "config": {"hidden_size": 2048, "projection_dim": 2048, "vocab_size": 257152},
        "text_config": {
            **{"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8},
            **{"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216, "max_position_embeddings": 8192},
        },
        "vision_config": {
            **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
            **{"image_size": 224, "patch_size": 14, "projection_dim": 2048},
        },
        "processor": {"size": {"height": 224, "width": 224}, "image_seq_length": 256},
    },
    "qwen2.5-vl-3b": {
        "family": "qwen2_5_vl",
        "config": {},
        "text_config": {
            **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
            **{"num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
            **{"out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        },
        "processor": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "patch_size": 14},
    },
}


def write(name: str, folder: Path) -> Path:
    """Write configuration, image processor and tokenizer of one of REAL to a folder, which it returns."""
    sizes = REAL[name]
    tiny.vlm(sizes["family"], folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text()) | sizes["config"]
    for part in ("text_config", "vision_config"):
        config[part] |= sizes[part]
    for derived in ("head_dim", "layer_types", "max_window_layers"):
        if derived not in sizes["text_config"]:
            config["text_config"].pop(derived, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes["processor"], indent=2))
    return folder


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
