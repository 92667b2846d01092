"""The weights that come with the package, for `torch.hub`; nothing to install beyond `dependencies`.

repo = 'vit-tinyimagenet/vit_tinyimagenet'
model = torch.hub.load(repo, 'laptop')                 # torch.hub.list(repo) has the others
preprocess = torch.hub.load(repo, 'preprocess', model)
model(preprocess(['photo.jpg'])).softmax(1)            # model.info.names has the classes
"""
from vit_tinyimagenet.api import RECIPE_NAMES as _RECIPE_NAMES, named as _named
from vit_tinyimagenet.deploy.predict import Preprocess as _Preprocess
from vit_tinyimagenet.models.pretrained import list_pretrained as _list_pretrained, load_pretrained as _load_pretrained

dependencies = 'torch torchvision numpy PIL pandas matplotlib tqdm safetensors filelock typeguard scipy'.split()


def preprocess(model):
    "What `model` is shown of an image, or of a list of images: files, bytes, Pillow's images, arrays or tensors."
    return _Preprocess(model)


def _entry(name, doc):
    def load(device='cpu'): return _load_pretrained(name, device)
    load.__doc__ = f'{doc} In evaluation mode; `info` has classes and normalisation.'
    return load


globals().update({n: _entry(n, doc) for n, doc in _named(*_RECIPE_NAMES).items() if n in _list_pretrained()})
