"""What arguments of a harness mean, and that no two steerings share a name in a cache."""

from __future__ import annotations

import re

import pytest

from moesteer.errors import InputError, MaskContentError, MaskFileError, NoEffectError
from moesteer.harness.steering import LABEL, Steering, Tally, identity, steering_of
from moesteer.mask import SteeringMask
from moesteer.models.steering import Receipt

Files = dict[str, str]


def test_one_several_and_listed_are_read_in_order(masks: Files, made: dict[str, SteeringMask]) -> None:
    both = (made["low"].sha256, made["high"].sha256)
    for given in (f"{masks['low']}; {masks['high']}", [masks["low"], masks["high"]]):
        found = steering_of(mask=given, alpha="0.5;-1e-2", where="here")
        assert (found.sha256, found.alphas, found.pinned) == (both, (0.5, -0.01), 0)
    assert steering_of(mask=masks["low"], where="here").alphas == (1.0,)  # the mask's own
    assert steering_of(where="here") == Steering()


def test_pins_come_first_and_keep_their_experts(masks: Files) -> None:
    found = steering_of(mask=masks["high"], alpha=2, pin=masks["low"], where="here")
    assert (found.pinned, found.alphas) == (1, (1.0, 2.0))
    with pytest.raises(MaskContentError, match="touches experts of the pinned mask") as caught:
        steering_of(mask=masks["weak"], pin=masks["low"], where="here")
    assert "layer 0, expert 0, and 47 more" in caught.value.where
    with pytest.raises(InputError, match="pinned mask has strength 0"):
        steering_of(pin=masks["low"], pin_alpha=0, where="here")


@pytest.mark.parametrize("alpha", ["x", "nan", float("inf"), True, "1;2", [0.5, 0.5]])
def test_strengths_that_are_none_or_too_many_are_refused(masks: Files, alpha: object) -> None:
    with pytest.raises(InputError):
        steering_of(mask=masks["low"], alpha=alpha, where="here")


def test_a_file_that_is_no_mask_is_refused(tmp_path, masks: Files) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no mask")
    with pytest.raises(MaskFileError):
        steering_of(mask=str(path), where="here")


def test_the_label_names_masks_and_strengths_and_is_found_again(masks: Files, made: dict[str, SteeringMask]) -> None:
    found = steering_of(mask=f"{masks['low']};{masks['high']}", alpha="0.5;1e-07", where="here")
    assert found.label == f"+{made['low'].sha256[:12]}@0.5+{made['high'].sha256[:12]}@1e-07"
    match = re.search(LABEL, f"org/model+x{found.label}")
    assert match is not None and match[0] == found.label
    assert steering_of(where="here").label == ""
    assert re.search(LABEL, "org/model+v2") is None


def test_everything_that_decides_an_answer_is_in_the_identity(masks: Files) -> None:
    def of(weights: str = "w", dtype: str = "float32", **given: object) -> str:
        return identity(steering_of(**given, where="here"), weights=weights, settings={"dtype": dtype})

    low, high = masks["low"], masks["high"]
    found = [
        of(), of(mask=low), of(mask=low, alpha=0.5), of(mask=high), of(pin=low), of(mask=[low, high]),
        of(mask=masks["gated"]), of(mask=low, weights="other"), of(mask=low, dtype="bfloat16"),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert of(mask=low) == found[1]


def test_the_tally_adds_up_and_refuses_steering_that_does_nothing() -> None:
    def receipt(**counts: object) -> Receipt:
        return Receipt(6, ("a" * 12,), (0.5,), **{"positions": 10, "checked": 60, "acted": True, **counts})

    tally = Tally()
    tally.add(receipt(changed=3, gated=2, fired=1), where="here")
    tally.add(receipt(changed=0, acted=False), where="here")  # one block may do nothing once others did
    tally.gates(asked=3, fired=2)
    assert tally.counts == {
        "routers": 6, "positions": 20, "checked": 120, "changed": 3, "gated": 5, "fired": 3, "acted": True,
    }  # fmt: skip
    Tally().add(receipt(changed=0, acted=False), where="here")  # a gate stayed shut
    with pytest.raises(NoEffectError, match=r"changed none of 60 selections at alpha 0\.5"):
        Tally().add(receipt(changed=0), where="here")
    with pytest.raises(NoEffectError, match="without asking its routers"):
        Tally().add(receipt(changed=1, positions=0), where="here")
