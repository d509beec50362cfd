"""Configurations that no policy can be built of."""

from dataclasses import replace

import pytest
from robots import ARM, CRANE, configuration

from vla import InputError
from vla.config import LossConfig
from vla.model import VLAPolicy
from vla.model.spec import check, check_losses

WRONG = {
    "a stride that is no power of two": ({"vision_stride": 6}, "--model.vision_stride 6 does not fit images of 16x24"),
    "a stride that divides one side only": (
        {"vision_stride": 16},
        "--model.vision_stride 16 does not fit images of 16x24",
    ),
    "a stride of one": ({"vision_stride": 1}, "--model.vision_stride 1 does not fit"),
    "a width that heads do not divide": (
        {"width": 40},
        "--model.width 40 is no multiple of 8 x --model.attention_heads 2",
    ),
    "tokens that patches do not divide": ({"max_tokens": 30}, "--model.max_tokens is 30; expected a multiple of 4"),
    "too few tokens": ({"max_tokens": 4}, "--model.max_tokens is 4; .* at least 8"),
    "no step of a chunk": ({"n_action_steps": 0}, "--model.n_action_steps is 0; expected 1 to --model.chunk_size 4"),
    "more steps than a chunk has": (
        {"n_action_steps": 5},
        "--model.n_action_steps is 5; expected 1 to --model.chunk_size 4",
    ),
    "a gripper that is no action": (
        {"head": "regression", "gripper_dims": (1, 3)},
        r"--model.gripper_dims names \[3\], but actions of arm have the dimensions 0 to 2",
    ),
    "a gripper that only one robot has": (
        {"datasets": (ARM, CRANE), "head": "regression", "gripper_dims": (2,)},
        r"--model.gripper_dims names \[2\], but actions of crane have the dimensions 0 to 1; .* in every data set",
    ),
    "a data set twice": (
        {"datasets": (ARM, ARM)},
        r"the data sets are named \['arm', 'arm'\]; expected .* another name",
    ),
    "a data set named like an action": (
        {"datasets": (ARM, replace(CRANE, name="grip"))},
        "data set grip is named like an action, so that its metrics are too; rename it",
    ),
    "a camera that the policy lacks": (
        {"datasets": (ARM, replace(CRANE, cameras=("wrist", "hook")))},
        r"data set crane has the cameras \['wrist', 'hook'\]; expected .* of \['table', 'wrist'\], in this order",
    ),
    "cameras in another order": (
        {"datasets": (replace(ARM, cameras=("wrist", "table")),)},
        r"data set arm has the cameras \['wrist', 'table'\]; expected",
    ),
    "a robot without a camera": (
        {"datasets": (ARM, replace(CRANE, cameras=()))},
        r"data set crane has the cameras \[\]; expected one or more",
    ),
    "a gripper counted from the end": (
        {"head": "regression", "gripper_dims": (-1,)},
        r"--model.gripper_dims names \[-1\]",
    ),
    "a gripper without regression": (
        {"gripper_dims": (2,)},
        "--model.gripper_dims has no effect with --model.head flow",
    ),
    "a weight below zero": ({"loss": LossConfig(flow=-1)}, "--model.loss.flow is -1; expected 0 or more"),
    "a weight of another head": ({"loss": LossConfig(mse=1)}, "--model.loss.mse has no effect with --model.head flow"),
    "a weight of a gripper that is not there": (
        {"head": "regression", "loss": LossConfig(bce=2)},
        "--model.loss.bce has no effect with --model.head regression",
    ),
    "no weight at all": ({"loss": LossConfig(flow=0)}, "the loss weights flow are all 0"),
    "nothing but language": ({"head": "token", "loss": LossConfig(ce=0, lm=1)}, "the loss weights ce are all 0"),
    "a part to train under one that is never": (
        {"freeze": ("language_model", "language_model.norm"), "unfreeze": (("language_model.norm", 5),)},
        "--model.unfreeze language_model.norm 5 has no effect under language_model, which --model.freeze freezes for",
    ),
    "a part to train under one that is later": (
        {
            "freeze": ("language_model", "language_model.norm"),
            "unfreeze": (("language_model", 6), ("language_model.norm", 5)),
        },
        "--model.unfreeze language_model.norm 5 has no effect under language_model, which --model.freeze freezes for",
    ),
    "language of a frozen model": (
        {"loss": LossConfig(lm=1), "freeze": ("language_model",)},
        "--model.loss.lm trains the language_model, which --model.freeze freezes",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_policy_that_cannot_be_built_is_refused_naming_the_flag(wrong):
    model, told = WRONG[wrong]
    for build in (VLAPolicy, check):
        with pytest.raises(InputError, match=told):
            build(configuration(**model))


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"bce": 0}, "the loss weights bce are all 0, so the gripper dimensions learn nothing; raise one"),
        ({"l1": 0}, "the loss weights l1, mse are all 0, so the other dimensions learn nothing; raise one"),
    ],
)
def test_loss_that_leaves_dimensions_untrained_is_refused_to_new_runs_alone(loss, told):
    config = configuration(head="regression", gripper_dims=(2,), loss=LossConfig(**loss))
    check(config)
    with pytest.raises(InputError, match=told):
        check_losses(config)


UNCHECKED = {
    "no flow step: noise is what it does": {"flow_steps": 0},
    "one bin: it learns nothing": {"head": "token", "bins": 1},
    "no bin: fails in the first step": {"head": "token", "bins": 0},
    "smoothing above one: fails in the first step": {"head": "token", "label_smoothing": 2.0},
    "smoothing below zero": {"head": "token", "label_smoothing": -0.1},
    "smoothing without bins: no effect": {"head": "flow", "label_smoothing": 0.1},
    "no attention head: ZeroDivisionError": {"attention_heads": 0},
    "a width of 8: fails in the first step": {"width": 8, "attention_heads": 1},
    "an unknown part to freeze: AttributeError": {"freeze": ("head",)},
    "only grippers and no weight for them: it learns nothing": {
        "head": "regression",
        "gripper_dims": (0, 1, 2),
        "loss": LossConfig(bce=0.0),
    },
    "a weight that is no number": {"loss": LossConfig(flow=float("nan"))},
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("wrong", UNCHECKED)
def test_policy_that_cannot_learn_or_act_is_refused_before_the_first_step(wrong):
    with pytest.raises(InputError):
        VLAPolicy(configuration(**UNCHECKED[wrong]))
