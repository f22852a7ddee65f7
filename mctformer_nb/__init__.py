"""Segmentation masks from image-level labels: the Multi-class Token Transformer (CVPR 2022).

    import mctformer_nb as mct
    ds = mct.get_dataset('mini')
    model, config = mct.load_run(mct.train_classifier(ds, backbone='mct_tiny_patch8_96', epochs=6))

The names below are looked up when they are first used, so that importing the package costs nothing and nobody pays for
fastai who does not train. `from mctformer_nb.all import *` brings everything, for notebooks."""
__version__ = "0.1.0"

from importlib import import_module as _import_module

# a function cannot be here under the name of a room: importing the room `random_walk` binds that name to it
_DOOR = {name: module for module, names in dict(
    datasets='get_dataset Dataset', mctformer='MCTformer build_model', checkpoints='load_reference', runs='load_run save_run',
    attention='localize localize_image plot_maps', frozen='train_frozen', train='train_classifier', seeds='extract_seeds show_seeds',
    artifacts='load_seed save_seed', crf='crf_labels dense_crf', affinitynet='train_affinity', random_walk='make_masks',
    deeplab='train_segment', segment='segment_dataset', predict='predict_photos', core='overlay',
    scores='score_masks sweep_threshold score_table', views='Views input_spec').items() for name in names.split()}
__all__ = sorted(_DOOR)

def __getattr__(name):
    "One of the names that people use, from the module that has it"
    if name in _DOOR: return getattr(_import_module(f'{__name__}.{_DOOR[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}. It has: {", ".join(__all__)}')

def __dir__(): return sorted({*globals(), *__all__})
