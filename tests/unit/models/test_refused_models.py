"""Models that are refused in one line before anything starts."""

import pytest
from huggingface_hub import constants

from onpolicy_skd.models import loading
from onpolicy_skd.models.loading import ModelError, check_weights, resolve_path


@pytest.mark.parametrize(
    ("file", "message"),
    [("pytorch_model.bin", r"only pickled weights \(pytorch_model.bin\)"), ("notes.txt", "the folder has no weights")],
)
def test_a_folder_without_safetensors_is_refused(file, message, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / file).write_text("")
    with pytest.raises(ModelError, match=message):
        check_weights(str(tmp_path))


def test_a_hub_name_without_a_network_is_refused_quickly(monkeypatch):
    tried = []

    def no_route(*address, **_):
        tried.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "create_connection", no_route)
    loading._hub_answers.cache_clear()
    with pytest.raises(ModelError, match=r"'nobody/nothing': no such folder, not in the .* the hub does not answer"):
        resolve_path("nobody/nothing")
    assert len(tried) == 1
    loading._hub_answers.cache_clear()
