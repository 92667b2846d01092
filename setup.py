"Reads settings.ini, with configparser alone: nbdev 2's customary file needs pkg_resources, which setuptools dropped."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
EXTRAS = 'dev', 'notebooks', 'bench', 'demo', 'hub', 'tensorboard', 'quantize', 'export'
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_name']: ['weights/*.safetensors', 'weights/forms/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in EXTRAS},
    entry_points={'console_scripts': cfg['console_scripts'].split('\n')},
    classifiers=['Programming Language :: Python :: 3'], zip_safe=False,
)
