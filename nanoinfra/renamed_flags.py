"""The one table of renamed flags, by command: {old name: new name}, spelled as the fields of its dataclass.

`nanoinfra serve --budget 512` is answered with the new name of the flag. The flags that an earlier version
stored in a run directory (config.json, and state.json of each checkpoint) are read under their new names.
"""

RENAMED_FLAGS = {
    "train": {"wire": "emulate_link", "sp_keep": "sp_save_gathered", "data_parallel": "grad_sync",
              "virtual": "virtual_stages", "keep": "keep_checkpoints", "seconds": "max_seconds"},
    "doctor": {"wire": "emulate_link"},
    "serve": {"budget": "max_num_batched_tokens", "seats": "max_num_seqs", "queue": "max_queued_requests",
              "queue_tokens": "max_queued_tokens", "name": "served_model_name", "drain": "shutdown_timeout"},
}


def check_no_renamed_flags(argv: list[str]) -> None:
    """Raise ValueError with the new name for the first old flag of the command `argv[0]` in `argv`."""
    renamed = RENAMED_FLAGS.get(argv[0], {}) if argv else {}
    for word in argv[1:]:
        option, no = word.partition("=")[0].replace("_", "-"), ""
        if option.startswith("--no-"):
            option, no = f"--{option.removeprefix('--no-')}", "no-"
        if option.startswith("--") and (new := renamed.get(option[2:].replace("-", "_"))):
            raise ValueError(f"--{no}{option[2:]} is now --{no}{new.replace('_', '-')}; "
                             f"see nanoinfra {argv[0]} --help")


def with_new_flag_names(stored: dict) -> dict:
    """A run's config.json or a checkpoint's state, its {"flags": {group: {name: value}}} under new names."""
    groups = stored.get("flags")
    if not isinstance(groups, dict):
        return stored
    new = RENAMED_FLAGS["train"]
    return stored | {"flags": {group: {new.get(name, name): value for name, value in flags.items()}
                               if isinstance(flags, dict) else flags for group, flags in groups.items()}}
