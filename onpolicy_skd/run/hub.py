"""Upload of a finished run's student to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable

from onpolicy_skd.config.errors import first_line
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.report.secrets import redact
from onpolicy_skd.run.stop import Stopped
from onpolicy_skd.storage.files import RunPaths

NO_LOGIN = "no login for the Hugging Face hub; run `hf auth login` or set HF_TOKEN"


def has_login() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def push(settings: Settings, log: Callable[[str], None]) -> str | None:
    """Upload ``final/`` to the model repository ``hub.push``; return its address, or None with one line in the log.

    The run has finished already, so no failure here (login, token, network, a signal) makes it fail.
    """
    from huggingface_hub import HfApi

    name, final = settings.hub.push, RunPaths(settings.run.folder).final
    assert name is not None
    try:
        if not has_login():
            raise PermissionError(NO_LOGIN)
        api = HfApi(library_name="onpolicy_skd")
        repo = api.create_repo(name, private=settings.hub.private, exist_ok=True)
        log(f"uploading {final} to {repo}")
        api.upload_folder(repo_id=repo.repo_id, folder_path=final, commit_message=f"Student of run {settings.run.name}")
    except (Exception, KeyboardInterrupt, Stopped) as error:  # the client raises many kinds, also of httpx
        reason = redact(first_line(error) or type(error).__name__)
        flag = " --private" if settings.hub.private else ""
        log(f"warning: hub.push={name}: {reason}. The student stays in {final}; upload it with: hf upload {name} "
            f"{final}{flag}")  # fmt: skip
        return None
    log(f"the student is at {repo}")
    return str(repo)
