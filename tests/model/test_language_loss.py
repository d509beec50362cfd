"""The loss of the instruction, which the built-in language model takes given the images."""

import numpy as np
import pytest
import torch
from robots import TEXTS, random_batch, tiny

from vla.config import LossConfig


def test_language_loss_equals_a_loop_over_the_bytes_of_each_instruction():
    policy = tiny(loss=LossConfig(lm=1.0))
    batch, logits = random_batch(policy), []
    policy.language_model.next_bytes.register_forward_hook(lambda *call: logits.append(call[-1].detach()))
    found = policy(batch)["lm"]
    expected = []
    for b, text in enumerate(TEXTS):
        ids = [257, *text.encode()]
        each = logits[0][b].view(-1, 258).log_softmax(-1)  # row 0 is of byte 4: the first patch is given
        errors = [-each[place - 4, ids[place]].item() for place in range(4, len(ids))]
        expected.append(sum(errors) / len(errors))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("byte", [1, 3, 4, 5, 11, 12, 19, 23])
def test_language_loss_predicts_a_byte_from_nothing_but_the_patches_before_it(byte):
    policy, logits = tiny(loss=LossConfig(lm=1.0)), []
    policy.language_model.next_bytes.register_forward_hook(lambda *call: logits.append(call[-1].detach()))
    text = "put the red cube in the"
    other = text[: byte - 1] + "Q" + text[byte:]  # byte 0 is the beginning mark
    for words in (text, other):
        policy(random_batch(policy, [words]))
    first, second = (each[0] for each in logits)  # [patches - 1, 4 * 258]: row p predicts patch p + 1
    patch = byte // 4
    torch.testing.assert_close(first[:patch], second[:patch], rtol=0, atol=1e-6)
    assert (first[patch:6] - second[patch:6]).abs().amax(-1).gt(1e-4).all()  # all six patches of text


def test_language_loss_depends_on_the_images():
    policy = tiny(loss=LossConfig(lm=1.0))
    batch = random_batch(policy)
    changed = policy(batch | {"images": 255 - batch["images"]})["lm"]
    assert abs(changed - policy(batch)["lm"]) > 1e-4
    loss = policy(batch | {"images": batch["images"]})["lm"]
    assert torch.equal(loss, policy(batch)["lm"])


def test_images_see_each_other_where_the_language_loss_is_taken(monkeypatch):
    policy, hidden = tiny(loss=LossConfig(lm=1.0)), []
    transform = policy.language_model._transform
    monkeypatch.setattr(
        policy.language_model, "_transform", lambda *given: (hidden.append(transform(*given)), hidden[-1])[1]
    )
    batch = random_batch(policy)
    policy(batch)
    batch["images"][:, 1] = 255 - batch["images"][:, 1]
    policy(batch)
    assert (hidden[1][:, 0] - hidden[3][:, 0]).abs().amax(-1).gt(1e-4).all()  # of the first camera's first token
