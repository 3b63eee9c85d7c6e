"""A result says where it comes from."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from offramp.common.provenance import provenance


def test_provenance_is_json_with_a_date_in_utc() -> None:
    entry = json.loads(json.dumps(provenance(7, ["offramp", "train", "a b"], "f00")))
    assert (entry["seed"], entry["command"], entry["data_digest"]) == (
        7,
        "offramp train 'a b'",
        "f00",
    )
    age = datetime.now(UTC) - datetime.fromisoformat(entry["date"])
    assert timedelta(seconds=-1) <= age < timedelta(minutes=1)


def test_provenance_names_the_versions_that_ran() -> None:
    import torch
    import transformers

    import offramp

    versions = provenance(None, "offramp demo", None)["versions"]
    assert versions["offramp"] == offramp.__version__
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["transformers"] == transformers.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_command_is_shown_by_name_not_by_where_it_lies() -> None:
    shown = provenance(None, ["/somewhere/bin/offramp", "train", "--out", "my exits"], None)
    assert shown["command"] == "offramp train --out 'my exits'"


def test_provenance_names_the_commit_that_ran() -> None:
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], check=False, capture_output=True, text=True
    )
    found = provenance(None, "", None)["versions"]["commit"]
    if asked.returncode:  # the sources without their history
        assert found is None
    else:
        assert found.removesuffix("+changed") == asked.stdout.strip()


def test_a_command_names_no_folder_of_this_machine() -> None:
    command = ["/usr/bin/offramp", "verify", "/home/ann/exits", "--out=/home/ann/c.json", "a/b=c"]
    assert provenance(None, command, None)["command"] == "offramp verify exits --out=c.json a/b=c"
    command[0] = "/home/ann/site-packages/offramp/cli/__main__.py"
    assert provenance(None, command, None)["command"] == "offramp verify exits --out=c.json a/b=c"
