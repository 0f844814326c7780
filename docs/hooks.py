"""Pages that ``make docs`` generates: settings from their schema, shipped configs, examples, files of the root."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from onpolicy_skd.config import shipped, validation
from onpolicy_skd.config.loading import accepted, fields_by_key
from onpolicy_skd.config.schema import rules_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Links of pages that are read in the repository, and where they lead in the site.
LINKS = (
    (r"\]\((?:\.\./)?CONTRIBUTING\.md\)", "](contributing.md)"),
    (r"\]\((?:\.\./)?CHANGELOG\.md\)", "](changelog.md)"),
    (r"\]\(\.\./examples[^)]*\)", "](examples.md)"),
    (r"\]\(\.\./configs/([\w/]+)\.yaml\)", lambda m: f"](configs.md#{m[1].replace('/', '')})"),
    (r"\]\(docs/([^)]+)\)", r"](\1)"),
)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {
        "settings.md": settings_page(),
        "configs.md": configs_page(),
        "examples.md": examples_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to files of the repository at the pages made of them."""
    for pattern, target in LINKS:
        markdown = re.sub(pattern, target, markdown)
    return markdown


def settings_page() -> str:
    """Return the reference of all settings, section by section."""
    lines = [
        "# Settings",
        "",
        "Each setting with its default, what is accepted, and the settings that it needs. A config is a YAML file of "
        "sections; on the command line a setting reads `section.name=value`. *Resumable* settings may change when a "
        "run is resumed.",
    ]
    section_of = {key: key.partition(".")[0] if "." in key else "top level" for key in fields_by_key()}
    for section, keys in groupby(fields_by_key(), section_of.__getitem__):
        lines += ["", f"## {section}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [_settings_row(key) for key in keys]
    return "\n".join(lines) + "\n"


def _settings_row(key: str) -> str:
    field = fields_by_key()[key]
    conditions = validation.conditions_of(field)
    notes = [
        f"Accepted: {_cell(accepted(field))}." if accepted(field) else "",
        f"Only with {_cell(conditions)}." if conditions else "",
        "*Resumable.*" if rules_of(field)["resumable"] else "",
    ]
    value = field.default if isinstance(field.default, str) else json.dumps(field.default, default=str).strip('"')
    default = "" if value in ("", "null") else "`" + value.replace("\n", "\\n") + "`"
    return f"| `{key}` | {default} | {_cell(str(field.description))}. {' '.join(filter(None, notes))} |"


def _cell(text: str) -> str:
    """Return ``text`` as it can stand in the cell of a table."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


def configs_page() -> str:
    """Return the shipped configs with their content."""
    lines = [
        "# Shipped configs",
        "",
        "`--config NAME` finds them; settings after it override them. The tables are the SE-KD paper's.",
    ]
    for name, file in shipped.shipped().items():
        lines += ["", f"## {name}", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def examples_page() -> str:
    """Return the notebook with its outputs, and the scripts."""
    lines = ["# Examples", "", "The notebook `examples/distil.ipynb` and the scripts next to it."]
    for cell in json.loads((EXAMPLES / "distil.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += ["", re.sub("^#", "##", source, flags=re.MULTILINE)]
        else:
            lines += ["", "```python", source, "```", *_outputs(cell)]
    for file in sorted(EXAMPLES.glob("*.py")):
        lines += ["", f"## {file.name}", "", "```python", file.read_text(encoding="utf-8").rstrip(), "```"]
    for file in sorted((EXAMPLES / "cluster").iterdir()):
        kind = {".sh": "bash", ".yaml": "yaml"}.get(file.suffix, "docker")
        lines += ["", f"## cluster/{file.name}", "", f"```{kind}", file.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _outputs(cell: dict[str, Any]) -> Iterator[str]:
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f'\n<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
        else:
            yield f"\n```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```"
