"""The one table of renamed flags, by command: {old name: new name}, spelled as the fields of its dataclass.

`nanoinfra serve --budget 512` is answered with the new name of the flag. The flags that an earlier version
stored in a run directory (config.json, and state.json of each checkpoint) are read under their new names, in
the groups that hold them now.
"""
from collections.abc import Mapping

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


def with_new_flag_names(stored: dict, group_by_flag: Mapping[str, str]) -> dict:
    """A run's config.json or a checkpoint's state, its {"flags": {group: {name: value}}} under new names.

    Each flag is put into the group that `group_by_flag` {name: group} says, whatever group it was stored in;
    a flag that it does not have stays where it is.
    """
    groups = stored.get("flags")
    if not isinstance(groups, dict):
        return stored
    broken = {group: flags for group, flags in groups.items() if not isinstance(flags, dict)}
    present = {}
    for group in groups.keys() - broken.keys():
        for old, value in groups[group].items():
            name = RENAMED_FLAGS["train"].get(old, old)
            present.setdefault(group_by_flag.get(name, group), {})[name] = value
    return stored | {"flags": present | broken}
