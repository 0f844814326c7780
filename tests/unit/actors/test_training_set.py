"""The engine that answers before training, without Ray."""

import types

from actors import training_set


def test_messages_of_its_engine_go_to_the_log_of_the_run(monkeypatch):
    log, given = [].append, []
    run = types.SimpleNamespace(settings=training_set.Settings())
    role = types.SimpleNamespace(on_device=lambda settings: settings, options=dict)
    monkeypatch.setattr(
        training_set, "RolloutGroup",
        lambda *_: given.append(_[-1]) or types.SimpleNamespace(actors=[], close=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(training_set, "wait_ready", lambda *_: given.append(_[-1]))
    with training_set.engine(run, types.SimpleNamespace(rollout=role), "student", log):
        assert given == [log, log]
