"""README's table of keys, from dpo_ds.config: `python -m tests.readme_keys` prints it; tests/test_readme.py keeps
README true.
"""

from dpo_ds import config
from dpo_ds.commands.cli import shown


def table() -> str:
    """One Markdown row a key, all commands' keys in the order of declaration."""
    rows = {}
    for settings in config.COMMANDS.values():
        for key, field in config.keys(settings).items():
            default = "required" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
            rows.setdefault(key, f"| `{key}` | {default} | {field.description} |")
    return "\n".join(rows[key] for key in sorted(rows, key=list(rows).index))


if __name__ == "__main__":
    print(table())
