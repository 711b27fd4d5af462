"""Git checkouts for the tests of contributions."""

import subprocess


def git(tree, *arguments):
    """Run git in a tree and return what it prints."""
    return subprocess.run(["git", "-C", str(tree), *arguments], check=True, capture_output=True, text=True).stdout


def commit_all(tree, message):
    """Make a tree a checkout with one commit."""
    for command in ("init", "config user.name A", "config user.email a@b.c", "add .", f"commit --message {message}"):
        git(tree, *command.split())
    return tree
