"""Prepare a release, and only prepare it: `release.py 0.2.0` sets the version, dates CHANGELOG, builds and checks.

The commit and the tag are yours to make; the commands are printed at the end.
"""
import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from shutil import rmtree

from cells import ROOT
from check import versions_in_step

WHERE = 'settings.ini', 'CHANGELOG.md', 'CITATION.cff', 'vit_tinyimagenet/__init__.py'


def replace_in(name, pattern, text):
    "Write `text` where `pattern` stands in a file of the repository; ends the program where it stands nowhere."
    path = ROOT/name
    new, n = re.subn(pattern, text, path.read_text(encoding='utf-8'), count=1, flags=re.MULTILINE)
    if not n: sys.exit(f'{name}: nothing to set, no line {pattern}')
    path.write_text(new, encoding='utf-8')


def check_changelog(version):
    "The top section has to be this version's, or not yet released."
    top = re.search(r'^## (.*)$', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)
    if not top: sys.exit('CHANGELOG.md: no section; write what changed')
    if not top[1].endswith('(unreleased)') and not top[1].startswith(f'{version} ('):
        sys.exit(f'CHANGELOG.md: the top section, {top[1]}, is released; write `## {version} (unreleased)` above it')


def set_version(version):
    today = date.today().isoformat()
    replace_in('CHANGELOG.md', r'^## .*$', f'## {version} ({today})')
    replace_in('settings.ini', r'^version = .*$', f'version = {version}')
    replace_in('CITATION.cff', r'^version: .*(\ndate-released: .*)?$', f'version: {version}\ndate-released: {today}')
    run(Path(sys.executable).with_name('nbdev_export'))


def run(*command): subprocess.run([str(o) for o in command], cwd=ROOT, check=True)


def build():
    "The source distribution and, from it, the wheel, alone in dist/; both checked."
    # an older list of files would add to this one's
    for o in 'build', 'dist', 'vit_tinyimagenet.egg-info': rmtree(ROOT/o, ignore_errors=True)
    run(sys.executable, '-m', 'check_manifest', '-q')
    run(sys.executable, '-m', 'build')
    run(sys.executable, '-m', 'twine', 'check', '--strict', *(ROOT/'dist').iterdir())
    run(sys.executable, '.ci/wheel_check.py', 'dist')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('version', help='such as 0.2.0')
    version = p.parse_args().version
    if not re.fullmatch(r'\d+\.\d+\.\d+((a|b|rc)\d+)?', version): p.error(f'{version}: not such as 0.2.0 or 0.2.0rc1')
    tags = subprocess.run(['git', 'tag', '--list', f'v{version}'], cwd=ROOT, capture_output=True, encoding='utf-8')
    if tags.stdout.strip(): sys.exit(f'v{version} is tagged; a version is released once')
    check_changelog(version)
    set_version(version)
    if problems := list(versions_in_step(version)): sys.exit('\n'.join(problems))
    build()
    print(f'''
{version} is ready, in dist/. Look at `git diff`; then commit, and when `make test-all` has passed, tag:

    git commit -m "{version}" {' '.join(WHERE)}
    git tag -a v{version} -m "{version}"
    git push origin HEAD v{version}

The tag starts .github/workflows/release.yaml, which builds again, checks, and publishes to PyPI.''')


if __name__ == '__main__': main()
