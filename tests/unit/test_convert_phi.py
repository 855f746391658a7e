"""convert.py: Phi-3.5-MoE, re-saved by transformers 5, gets back the name that other engines know."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moesteer.errors import ModelError
from moesteer.models.convert import convert


def test_a_re_saved_phi_gets_the_name_that_other_engines_know_and_nothing_else(folder_of, tmp_path):
    source = folder_of("phimoe")
    assert json.loads((source / "config.json").read_text())["architectures"] == ["PhimoeForCausalLM"], "the trap"
    done = convert(source, tmp_path / "out")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after.pop("architectures") == ["PhiMoEForCausalLM"] and before.pop("architectures")
    assert after.pop("converted_from")["model_type"] == "phimoe" and after == before
    a, b = load_file(source / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    loaded = AutoModelForCausalLM.from_pretrained(done.folder)
    original = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens).logits, original(tokens).logits)


def test_a_phi_with_the_hubs_name_has_nothing_to_convert(folder_of, tmp_path):
    shutil.copytree(folder_of("phimoe"), tmp_path / "phi")
    path = tmp_path / "phi" / "config.json"
    path.write_text(path.read_text().replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    with pytest.raises(ModelError, match="nothing to convert"):
        convert(tmp_path / "phi", tmp_path / "out")
    assert not (tmp_path / "out").exists()
