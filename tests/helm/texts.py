"""Checks that a person's texts in the values reach the reward worker as they were written.

Usage: python texts.py VALUES RENDERED        needs PyYAML
"""

import pathlib
import sys

import yaml

sys.path.append(str(pathlib.Path(__file__).parents[1] / "deploy"))
from command_lines import pods  # noqa: E402 (the path above leads to it)


def main():
    values, rendered = (pathlib.Path(argument).read_text(encoding="utf-8") for argument in sys.argv[1:])
    reward = yaml.safe_load(values)["reward"]
    wanted = [f"--system={reward['system']}"]
    wanted += [f"--prompted={objective['name']}={objective['text']}" for objective in reward["prompted"]]
    [passed] = [arguments for _, arguments, _ in pods(rendered) if arguments[0] == "reward"]
    for text in wanted:
        if text not in passed:
            print(f"{text!r} is not among {passed}")
    return 0 if set(wanted) <= set(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
