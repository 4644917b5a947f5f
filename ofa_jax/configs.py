"""The recipes as a package: of an installed one they lie within, of a checkout in configs/."""

import os

_HERE = os.path.dirname(os.path.abspath(__file__))
_PLACES = [os.path.join(_HERE, "configs"), os.path.join(os.path.dirname(_HERE), "configs")]

# A module with a path is a package: `ofa_jax.configs.NAME` is found there.
__path__ = [place for place in _PLACES if os.path.isdir(place)][:1]
