import pytest

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.run.exits import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, RunError, run_cli


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("learner.lr=2: too large"), EXIT_BAD_INPUT, "error: learner.lr=2: too large\n"),
        (RunError("no space left"), EXIT_FAILED, "error: no space left\n"),
        (KeyboardInterrupt(), EXIT_STOPPED, "interrupted; the same command continues\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    def action():
        raise error

    assert run_cli(action) == code
    assert capsys.readouterr().err == line
