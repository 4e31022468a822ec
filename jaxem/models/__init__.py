"""Models: latent structure x observation family."""

from .functions import from_functions as from_functions
from .hmm import HMM as HMM
from .hmm import HMMParams as HMMParams
from .hmm import HMMStats as HMMStats
from .kmeans import KMeans as KMeans
from .kmeans import KMeansParams as KMeansParams
from .kmeans import KMeansStats as KMeansStats
from .linear_gaussian_ssm import LinearGaussianSSM as LinearGaussianSSM
from .linear_gaussian_ssm import LinearGaussianSSMParams as LinearGaussianSSMParams
from .linear_gaussian_ssm import LinearGaussianSSMStats as LinearGaussianSSMStats
from .mixture import Mixture as Mixture
from .mixture import MixtureParams as MixtureParams
from .mixture import MixtureStats as MixtureStats
