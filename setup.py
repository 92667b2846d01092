"Reads settings.ini, with configparser alone: nbdev 2's customary file needs pkg_resources, which setuptools dropped."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
EXTRAS = 'dev', 'notebooks', 'bench', 'demo', 'hub', 'tensorboard', 'quantize', 'export'
STATUSES = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
files = f"{cfg['git_url']}/{{}}/v{cfg['version']}/"   # as they were at the release's tag


def absolute(text):
    "README's links from elsewhere, such as PyPI: `blob` is a page about a file, `raw` the file itself."
    place = lambda m: m[1] + files.format('raw' if m[1].startswith('!') else 'blob')
    return re.sub(r'(!?\[[^\]]*\]\()(?![a-z]+:|[/#])', place, text)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license_expression='Apache-2.0', license_files=['LICENSE'],
    long_description=absolute((here/'README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    project_urls={'Documentation': f"{cfg['doc_host']}{cfg['doc_baseurl']}", 'Source': cfg['git_url'],
                  'Issues': f"{cfg['git_url']}/issues", 'Changelog': files.format('blob') + 'CHANGELOG.md'},
    # the weights' folders are packages without a module
    packages=find_namespace_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"], exclude=['*.__pycache__']),
    package_data={cfg['lib_name']: ['weights/*.safetensors', 'weights/forms/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n')},
    classifiers=[f"Development Status :: {STATUSES[cfg['status']]}", f"Intended Audience :: {cfg['audience']}",
                 'Intended Audience :: Science/Research', 'Operating System :: OS Independent',
                 'Programming Language :: Python :: 3 :: Only',
                 *(f'Programming Language :: Python :: {o}' for o in ('3.11', '3.12', '3.13')),
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Topic :: Scientific/Engineering :: Image Recognition'],
    zip_safe=False,
)
