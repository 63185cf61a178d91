"""Tries every command of the documents, as far as it can be tried without a cluster, and says of each how.

Usage: python commands.py UNIARM HELM KUBECTL PROMTOOL, in the repository's root        needs PyYAML

Installations and upgrades of the chart are rendered with their own flags, and the outcome has to agree with itself. Other commands
of helm, kubectl and uniarm are read by the program itself, which is asked for help behind all of their flags: a flag, a value or a
command that it does not know is an error all the same. promtool runs. tests/helm/install.py runs helm and kubectl for real.
"""

import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

PAGE = "docs/kubernetes.md"
# Other pages, whose commands are uniarm's.
PAGES = ["README.md", "CONTRIBUTING.md", "deploy/runbook.md", *sorted(map(str, pathlib.Path("docs").glob("*.md")))]
CHART = "helm/uniarm"
PROGRAMS = ("uniarm", "helm", "kubectl")
ASK_S = 60
# Programs that need what is not here, and what that is.
NOT_HERE = {"docker": "it needs a container engine (the compose file is checked by itself)"}
# Flags of an installation that rendering does not know; True: a value follows.
REUSED = ("--reuse-values", "--reset-then-reuse-values")
NOT_RENDERED = {**dict.fromkeys([*REUSED, "--reset-values", "--install", "--wait"], False), "--timeout": True}
ENDS, REDIRECTIONS = {"&&", "||", ";", "|", "&"}, {">", ">>", "<"}


def blocks(text):
    """(section, lines) of everything that stands apart in a page: fences of sh or console, and indented lines."""
    section, fence, lines = "", None, []
    for line in [*text.splitlines(), ""]:
        if fence is None and lines and not line.startswith("    "):
            yield section, lines
            lines = []
        if fence is None and line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("```"):
            if fence is None:
                fence = line[3:].strip()
            else:
                if fence in ("sh", "console"):
                    yield section, [line.removeprefix("$ ") for line in lines if fence == "sh" or line.startswith("$ ")]
                fence, lines = None, []
        elif fence is not None:
            lines.append(line)
        elif line.startswith("    "):
            lines.append(line.strip().removeprefix("$ "))


def words_of(line):
    """The commands of a line, each as its words; a comment is none of them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    command, words = [], iter([*lexer, ";"])
    for word in words:
        if word in REDIRECTIONS:
            next(words)
        elif word in ENDS:
            if command:
                yield command
            command = []
        else:
            command.append(word)


def commands(path):
    """(section, words) of every command of a page."""
    for section, lines in blocks(pathlib.Path(path).read_text(encoding="utf-8")):
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            try:
                found = list(words_of(line))
            except ValueError as problem:
                if line.split()[0] in PROGRAMS:
                    raise ValueError(f"{path}: {line}: {problem}") from problem
                continue  # no command, but text that stands apart
            for words in found:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield section, [word for word in words if word != "…"]


def is_release(words):
    return words[0] == "helm" and words[1] in ("install", "upgrade") and CHART in words


def values_of(words):
    """The flags that say values, of an installation or an upgrade."""
    found, rest = [], iter(words[words.index(CHART) + 1 :])
    for word in rest:
        if word in NOT_RENDERED:
            if NOT_RENDERED[word]:
                next(rest)
        else:
            found.append(word)
    return found


def outcome(*command):
    """What is wrong with a command, in its own words; None where nothing is."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False, stdin=subprocess.DEVNULL)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()


class Rendered:
    """What a section's upgrades have said so far: the next one reuses it."""

    def __init__(self, helm):
        self.helm, self.section, self.values = helm, None, []

    def problem(self, section, words):
        if section != self.section or words[1] == "install":
            self.section, self.values = section, []
        self.values += values_of(words)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            rendered = subprocess.run(
                [self.helm, "template", words[2], CHART, "--namespace=steering", *self.values],
                capture_output=True,
                text=True,
                timeout=ASK_S,
                check=False,
            )
            if rendered.returncode != 0:
                return rendered.stderr.strip()
            file.write(rendered.stdout)
            file.flush()
            return outcome(sys.executable, "tests/helm/relations.py", file.name)


class Tries:
    """The commands that were tried, and what is wrong with them."""

    def __init__(self, programs, promtool):
        self.programs, self.promtool, self.rendered = programs, promtool, Rendered(programs["helm"])
        self.count, self.problems = 0, []

    def outcome(self, section, words):
        """(how a command was tried, what is wrong with it)."""
        program = words[0]
        if is_release(words):
            return "rendered", self.rendered.problem(section, words)
        if program in self.programs:
            return "read", outcome(self.programs[program], *words[1:], "--help")
        if program == "promtool" and self.promtool:
            return "run", outcome(self.promtool, *words[1:])
        if program in NOT_HERE or program == "promtool":
            return f"not tried: {NOT_HERE.get(program, 'it cannot be had here')}", None
        return "", "this test does not know how to try it"

    def all_of(self, path):
        for section, words in commands(path):
            if path != PAGE and words[0] != "uniarm":
                continue
            how, problem = self.outcome(section, words)
            self.count += 1
            print(f"{path}: {shlex.join(words)}: {problem or how}")
            self.problems += [f"{path}: {shlex.join(words)}: {problem}"] if problem else []


def main():
    *programs, promtool = sys.argv[1:]
    tries = Tries(dict(zip(PROGRAMS, programs)), promtool)
    for path in PAGES:
        tries.all_of(path)
    # The control: what is wrong is seen.
    for program, command in zip(PROGRAMS, ("generate", "history", "scale")):
        words = [program, command, "--no-such-flag"]
        if tries.outcome("", words)[1] is None:
            tries.problems.append(f"{shlex.join(words)} is taken")
    print(f"{tries.count} commands, {len(tries.problems)} problems", *tries.problems, sep="\n")
    return 1 if tries.problems or tries.count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
