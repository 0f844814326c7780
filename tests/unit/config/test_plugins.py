"""Functions of the user named in settings."""

import sys

from onpolicy_skd.config.plugins import find


def test_a_plugin_is_found_in_the_working_directory(tmp_path, monkeypatch):
    """The command `skd` starts without the working directory on sys.path."""
    (tmp_path / "plugin_of_the_working_directory.py").write_text("def score(signals):\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find("plugin_of_the_working_directory:score", {}, "positions.metric")(None) == 7
