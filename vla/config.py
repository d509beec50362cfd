"""Everything that a training run can be told: a field of these dataclasses is a flag, the comment above it its help."""

from dataclasses import dataclass, field, fields
from typing import Literal

MODULES = ("vision_encoder", "language_model", "action_head")  # of every policy; a composed one has a projector too


@dataclass(frozen=True)
class AugmentConfig:
    # Largest shift either way, as a share of height and width, in whole pixels; edge pixels are repeated.
    shift: float = 0.0
    # Largest share of height and width cut away; what is left, which may lie anywhere, is scaled to full size.
    crop: float = 0.0
    # Largest rotation about the centre either way, in degrees; edge pixels are repeated.
    rotate: float = 0.0
    # Values times 1 ± this.
    brightness: float = 0.0
    # Distances from the image's mean gray times 1 ± this.
    contrast: float = 0.0
    # Distances from each pixel's gray times 1 ± this.
    saturation: float = 0.0
    # Largest turn of the colours either way, as a share of the colour circle.
    hue: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    # LeRobot data sets, v2.1 or v3.0: folders, or owner/name on the Hugging Face hub (owner/name@revision).
    path: tuple[str, ...] = ()
    # What the data sets are called from then on, by logs and by those who drive a robot (their folders' names).
    names: tuple[str, ...] = ()
    # Shares of the samples that come from each of several data sets.
    weights: tuple[float, ...] = ()
    # Cameras to look through, in this order, by short name (wrist for observation.images.wrist) or feature; all if none
    # is named. What a data set lacks is masked there.
    cameras: tuple[str, ...] = ()
    # Other names for cameras, so that those of several data sets match: hand=wrist, or dataset:hand=wrist.
    camera_map: tuple[str, ...] = ()
    # Features whose numbers make up the state (by convention observation.state).
    state: tuple[str, ...] = ()
    # Features whose numbers make up the action (by convention action).
    action: tuple[str, ...] = ()
    # Fill the states and actions of data sets that have fewer dimensions up with zeros, which are not learned.
    pad_dims: bool = False
    # Height and width that all pictures are brought to, their aspect kept; as they are if not given.
    image_size: tuple[int, ...] = ()
    # Decoded pictures: kept on the disk or in the memory of each process; or none, so that they are decoded when read.
    cache: Literal["disk", "memory", "none"] = "disk"
    # Folder of the cache, if not .vla_cache in the data set's own.
    cache_dir: str = ""
    # Seconds by which the time of a frame may miss frame_index / fps: less than half a frame.
    tolerance_s: float = 1e-4
    # Leave out episodes with faults; python -m vla.data check lists them.
    skip_bad: bool = False
    # Faults to live with: action dimensions that never change, instructions that several tasks share, frames of no
    # episode between those of two in a video, episodes of a split other than train.
    accept: tuple[Literal["constant_action", "shared_instruction", "video_gap", "other_split"], ...] = ()
    # Share of whole episodes held out for validation. 0: all are trained on, and without eval.env nothing is
    # evaluated: the last checkpoint is exported.
    val_fraction: float = 0.05
    # Loader processes for each training process.
    workers: int = 2
    # Random changes of the training images, drawn for each camera of each sample; 0: none.
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; a term counts where the head has it."""

    # Regression head: absolute error.
    l1: float = 1.0
    # Regression head: squared error.
    mse: float = 0.0
    # Regression head: binary cross-entropy of the gripper dimensions.
    bce: float = 1.0
    # Flow head: squared error of the velocity.
    flow: float = 1.0
    # Token head: cross-entropy of the binned actions.
    ce: float = 1.0
    # Any head: cross-entropy of the instruction's next token, given the images.
    lm: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    # How actions are predicted: flow matching, direct regression, or classification into bins.
    head: Literal["flow", "regression", "token"] = "flow"
    # Actions predicted at once (H).
    chunk_size: int = 16
    # Actions of a chunk that are executed before the policy looks again.
    n_action_steps: int = 8
    # Pretrained image-text model in place of the built-in backbone: SmolVLM, Idefics3, PaliGemma, Qwen2.5-VL or
    # Qwen3-VL, a folder or owner/name on the Hugging Face hub.
    backbone: str = ""
    # Or one composed of two, joined by a projector: this image encoder (SigLIP, SigLIP 2, DINOv2, DINOv3, …)
    vision_backbone: str = ""
    # … and this causal language model.
    language_backbone: str = ""
    # Give the pretrained parts random weights, for tests and benchmarks.
    random_backbone: bool = False
    # Run the code that comes with a pretrained model.
    trust_remote_code: bool = False
    # How pretrained parts compute attention.
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    # What frozen weights of a pretrained vision_encoder or language_model are kept in.
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    # Compute the activations of transformer layers again in the backward pass, in place of keeping them.
    gradient_checkpointing: bool = False
    # Width of the tokens (D); of the action head alone, if the backbone is pretrained.
    width: int = 256
    # Residual convolution blocks at each scale of the built-in image encoder.
    vision_blocks: int = 1
    # Pixels per image token and direction of the built-in image encoder: a power of two.
    vision_stride: int = 16
    # Transformer layers over image and instruction tokens; of a pretrained model the first ones (0: all, built in: 4).
    language_layers: int = 0
    # Layer whose output the action head attends to (0: the last); those above it learn from loss.lm alone.
    hidden_layer: int = 0
    # Transformer layers of the action head.
    head_layers: int = 4
    # Attention heads in every transformer layer that is not pretrained.
    attention_heads: int = 8
    # Width of the hidden layer in these, in multiples of the width.
    mlp_ratio: int = 4
    # Tokens that every instruction is padded to; longer ones are refused. Built in: its bytes and one; a multiple of 4.
    max_tokens: int = 64
    # Scale of states and actions.
    normalization: Literal["mean_std", "min_max", "quantile"] = "quantile"
    # Action dimensions with two values, such as a gripper: learned by classification (regression head).
    gripper_dims: tuple[int, ...] = ()
    # Euler steps from noise to actions (flow head).
    flow_steps: int = 10
    # Bins for each action dimension (token head).
    bins: int = 256
    # Share of probability spread over all bins (token head).
    label_smoothing: float = 0.0
    # Parts that are not trained: vision_encoder, projector, language_model, action_head, or parts of them by their
    # names, such as language_model.model.embed_tokens.
    freeze: tuple[str, ...] = ()
    # Steps from which on frozen parts are trained after all, as name and step: language_model 2000.
    unfreeze: tuple[tuple[str, int], ...] = ()

    loss: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) on frozen linear maps, through peft."""

    # Rank of the adapters (0: none).
    rank: int = 0
    # Adapters are scaled by alpha / rank.
    alpha: float = 16.0
    # Share of an adapter's inputs that are dropped in training.
    dropout: float = 0.0
    # Modules that get adapters, and whose own weights are frozen.
    modules: tuple[str, ...] = ("language_model",)
    # Linear maps in them, by the ends of their names, such as q_proj v_proj (by default all in the repeated blocks).
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MovedConfig:
    # Where the pretrained image-text model under adapters lies now, if not where the run found it.
    backbone: str = ""
    # The same of the image encoder of a composed one.
    vision_backbone: str = ""
    # The same of its language model.
    language_backbone: str = ""

    def moved(self) -> dict[str, str]:
        """As VLAPolicy.from_pretrained takes it."""
        return {each.name: getattr(self, each.name) for each in fields(MovedConfig)}


@dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate, of AdamW.
    lr: float = 3e-4
    # Peak learning rate of Muon (Jordan et al., 2024), such as 0.01, which then moves the weights of linear maps and
    # convolutions in transformer blocks and in the built-in image encoder (0: AdamW moves them, too).
    muon_lr: float = 0.0
    # Learning rates of modules, or parts of them, as name and rate: vision_encoder 1e-4 action_head 5e-4. (Muon's is in
    # proportion.)
    module_lrs: tuple[tuple[str, float], ...] = ()
    # Shape of the learning rate over the run, after the warm-up.
    schedule: Literal["constant", "linear", "cosine", "step", "wsd"] = "cosine"
    # Steps over which the rate rises from 0.
    warmup_steps: int = 500
    # What is left of the rate at the end (linear, cosine, wsd).
    final_ratio: float = 0.02
    # Shares of the run after which the rate falls to a tenth (step).
    milestones: tuple[float, ...] = (0.6, 0.85)
    # Share of the run, at its end, over which the rate falls (wsd: warm-up, stable, decay).
    decay_share: float = 0.2
    # Weight decay, on weights of linear maps and convolutions only.
    weight_decay: float = 0.01
    # AdamW's decay rates of the two moments.
    betas: tuple[float, float] = (0.9, 0.95)
    # Keep AdamW's moments in 8 bits, a quarter of their memory, by bitsandbytes (Dettmers et al., 2022).
    eight_bit: bool = False
    # Largest gradient norm (0: no clipping; the norm is logged all the same).
    clip: float = 1.0
    # Decay of the moving average of the weights, which is then evaluated and exported (0: off).
    ema: float = 0.999


@dataclass(frozen=True)
class EvalConfig:
    # Steps between evaluations (0: only at the end).
    every: int = 1000
    # At most this many held-out frames, evenly spaced.
    samples: int = 2048
    # What the best checkpoint is chosen by, and early stopping. A run that goes on with another one, or with other
    # samples or episodes, looks for its best anew.
    metric: Literal["loss", "action_error", "success"] = "loss"
    # Evaluations without improvement until the run stops (0: never).
    patience: int = 0
    # What counts as an improvement.
    min_delta: float = 0.0
    # Environment to act in at every evaluation, such as tabletop or metaworld (none if empty); it draws images of the
    # size that the data's have on the disk.
    env: str = ""
    # Data set whose robot acts there, if that of several could.
    dataset: str = ""
    # Episodes to act, shared out over the processes.
    episodes: int = 20


@dataclass(frozen=True)
class CheckpointConfig:
    # Steps between checkpoints.
    every: int = 1000
    # Newest checkpoints to keep; the best is kept beside them.
    keep: int = 2
    # Also keep every checkpoint whose step is a multiple of this, itself a multiple of `every` (0: none).
    keep_every: int = 0


@dataclass(frozen=True)
class GuardConfig:
    # Updates skipped in a row, as loss or gradient was not finite, until the run goes back to its last good checkpoint
    # and leaves these samples out (in fp16 16 more, which its scale may need).
    bad_steps: int = 10
    # Times that it goes back until it stops.
    rollbacks: int = 3
    # A loss beyond this many times its running average is not learned either (0: off).
    spike_factor: float = 0.0
    # Seconds without any progress after which a process ends the run and says who hangs (0: never).
    hang_seconds: float = 600.0


@dataclass(frozen=True)
class LogConfig:
    # Steps between log lines.
    every: int = 50
    # Steps of this start alone to trace with torch's profiler, after its first ten, for RUN/profile (TensorBoard,
    # Perfetto).
    profile: int = 0
    # Where metrics go beside metrics.jsonl, by accelerate's names: tensorboard, wandb, …
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class TrainConfig:
    """Train a vision-language-action policy."""

    # Folder of the run: configuration, checkpoints, logs, export.
    run_dir: str = ""
    # Go on from a run folder (its newest good checkpoint), RUN/best, or one checkpoint; `auto`: from --run_dir if it
    # has any.
    resume_from: str = ""
    # Start from these weights alone: an export, a safetensors file, or a state_dict (.pt).
    init_from: str = ""
    # Seed of everything random.
    seed: int = 0
    # Use deterministic algorithms only: on GPUs two runs, or a run and its resumption, are else the same to rounding.
    deterministic: bool = False
    # Compile the policy with torch.compile.
    compile: bool = False
    # Start forward and backward pass on the GPU by one launch each, as CUDA graphs: a small policy waits for launches.
    cuda_graphs: bool = False
    # Optimizer steps in all.
    steps: int = 0
    # Passes over the training frames, in place of steps (20 if neither is given).
    epochs: float = 0.0
    # Samples of one optimizer step, over all processes.
    global_batch_size: int = 64
    # Samples that one process takes at once (0: global batch / processes).
    micro_batch_size: int = 0

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
