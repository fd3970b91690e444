"""The optimizers: each body is one chain.

In the equations ``p`` is a parameter, ``g`` its gradient, ``m`` and ``v`` its moments, ``t`` the
step counted from 1, ``lr`` the learning rate of the step and ``wd`` the weight decay.
"""

from lionax.core.hyperparameters import Interval, Scalar, check_scalar, named
from lionax.core.masks import Mask
from lionax.core.storage import StorageLike
from lionax.core.transformation import Transformation, constructor
from lionax.transforms.adaptive import scale_by_adam, scale_by_trust_ratio
from lionax.transforms.combining import chain, identity
from lionax.transforms.decay import add_decayed_weights
from lionax.transforms.majority_vote import AxisName, scale_by_majority_vote
from lionax.transforms.momentum import trace
from lionax.transforms.scaling import scale_by_learning_rate
from lionax.transforms.sign_momentum import scale_by_lion

__all__ = ["adam", "adamw", "lamb", "lion", "majority_vote_lion", "sgd"]


def _decay(weight_decay: Scalar, mask: Mask, base_learning_rate: float | None) -> Transformation:
    """`add_decayed_weights`, but a decay below 0, by which parameters grow, is a mistake."""
    accepted = Interval(0.0)
    check_scalar(weight_decay, accepted, "add_decayed_weights", "weight_decay")
    return add_decayed_weights(named(weight_decay, "weight_decay", accepted), mask,
                               base_learning_rate=base_learning_rate)


@constructor
def lion(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: StorageLike = None,
         weight_decay: Scalar = 1e-3, mask: Mask = None, *,
         base_learning_rate: float | None = None) -> Transformation:
    """Lion: steps of equal size along the sign of an interpolated momentum.

        p ← p - lr·(sign(b1·m + (1 - b1)·g) + wd·p)
        m ← b2·m + (1 - b2)·g

    Every element moves by ``lr``. So the learning rate is usually 3 to 10 times smaller than
    AdamW's, and the weight decay as much larger. Arithmetic is in float32, for float64 leaves in
    float64.

    Args:
      learning_rate: the size of a step, at least 0, in units of the parameter. Here and below a
        number may also be a 0-d array, a schedule (a function of the step) or ``inject(value)``.
      b1: the momentum's weight in the sign, in [0, 1].
      b2: the decay of the momentum in each step, in [0, 1].
      mu_dtype: how the momentum is stored: what `Storage` takes, such as "bfloat16" or "int8"; a
        dict of these by regular expressions over paths; None for the parameter's own dtype.
      weight_decay: the fraction of a parameter that is subtracted in each step, per unit of
        learning rate; at least 0. With 0 ``update`` needs no parameters.
      mask: the leaves to decay: a tree of bools with the parameters' structure or a prefix of it, a
        function that makes one from the parameters, or `matching`; None for all.
      base_learning_rate: None, or the greatest learning rate ``α`` of the schedule, above 0: the
        decay is then ``(lr/α)·wd·p``, multiplied by the schedule alone, as Loshchilov and Hutter
        (2019) have it, and lion-pytorch with ``decoupled_weight_decay``.

    Raises:
      ValueError: for a number out of range, a ``mu_dtype`` that is not floating-point, or, where it
        is used, a mask that does not fit the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lion(0.1, weight_decay=0.5)
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([-3.0]))
    >>> params.tolist(), round(float(state.rules[0].mu[0]), 4)
    ([2.0], -0.03)

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv:2302.06675, algorithm
      2.
    """
    return chain(scale_by_lion(b1, b2, mu_dtype),
                 _decay(weight_decay, mask, base_learning_rate),
                 scale_by_learning_rate(learning_rate))


@constructor
def majority_vote_lion(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.99,
                       mu_dtype: StorageLike = None, weight_decay: Scalar = 1e-3,
                       mask: Mask = None, *, base_learning_rate: float | None = None,
                       axis_name: AxisName) -> Transformation:
    """Lion for data parallelism in ``shard_map``: workers exchange votes, not gradients.

        v_i = sign(b1·m_i + (1 - b1)·g_i)          (the vote of worker i)
        p ← p - lr·(sign(Σ v_i) + wd·p)
        m_i ← b2·m_i + (1 - b2)·g_i

    A vote is packed into 1 bit for each parameter, the majority into 2, as ``sign(0) = 0``: a tie
    moves nothing. Of n parameters each of W workers sends ``3n/8·(W - 1)/W`` bytes, in two
    collectives for all leaves; a ring all-reduce of float32 gradients sends ``8n·(W - 1)/W``.
    Parameters stay the same on all workers. With equal gradients it is `lion`.

        def train_step(params, state, batch):
            own = jax.lax.pcast(params, "data", to="varying")  # else jax.grad sums over workers
            return tx.step(params, state, jax.grad(loss)(own, batch))
        def spec(keys, leaf):
            return P("data") if ".mu" in jax.tree_util.keystr(keys) else P()
        specs = jax.tree_util.tree_map_with_path(spec, jax.eval_shape(tx.init, params))
        init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
        train_step = jax.shard_map(train_step, mesh=mesh, in_specs=(P(), specs, P("data")),
                                   out_specs=(P(), specs))

    What it costs:

    - Memory: each worker keeps a whole momentum of its own, which cannot be sharded over the
      workers. In the state ``mu`` has a first axis for them: of size 1 inside of ``shard_map``, of
      size W outside, as in a checkpoint.
    - Worker count: each votes on its share of the batch, so signs are noisier the more workers
      share it; tune the learning rate anew. For another count give each the mean of the momenta.
    - No clip by the norm of the global gradient, which no worker has. `clip_by_global_norm` before
      it takes the norm of all workers' gradients as one vector, with an all-reduce of a scalar.
    - A worker whose sign is 0 or NaN votes up and down in turn. Zeros of all workers cancel.
    - No `accumulate` around it, whose sums would differ between workers.

    Args:
      learning_rate: the size of a step, at least 0, in units of the parameter. Here and below a
        number may also be a 0-d array, a schedule (a function of the step) or ``inject(value)``.
      b1: the momentum's weight in the vote, in [0, 1].
      b2: the decay of the momentum in each step, in [0, 1].
      mu_dtype: how the momentum is stored, as in `lion`.
      weight_decay: the fraction of a parameter that is subtracted in each step, per unit of
        learning rate; at least 0.
      mask: the leaves to decay, as in `lion`.
      base_learning_rate: None, or the greatest learning rate of the schedule, as in `lion`.
      axis_name: the mesh axis, or a tuple of the axes, along which the workers differ.

    Raises:
      TypeError: for an ``axis_name`` that is not a name or a tuple of names; where it is used, for
        a complex leaf.
      ValueError: for a number out of range or a ``mu_dtype`` that is not floating-point; where it
        is used, outside of ``shard_map``, and for gradients that are the same on all workers.

    >>> import jax, jax.numpy as jnp, lionax
    >>> from jax.sharding import PartitionSpec as P
    >>> tx = lionax.majority_vote_lion(0.5, weight_decay=0.0, axis_name="data")
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    >>> first_step = jax.shard_map(lambda p, g: tx.step(p, tx.init(p), g)[0], mesh=mesh,
    ...                            in_specs=(P(), P("data")), out_specs=P())
    >>> first_step(jnp.zeros(2), jnp.array([3.0, -0.1])).tolist()
    [-0.5, 0.5]

    References:
      Liu et al., Communication Efficient Distributed Training with Distributed Lion, 2024,
      arXiv:2404.00438, with majority vote.
    """
    return chain(scale_by_majority_vote(b1, b2, mu_dtype, axis_name=axis_name),
                 _decay(weight_decay, mask, base_learning_rate),
                 scale_by_learning_rate(learning_rate))


@constructor
def lamb(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-6,
         eps_root: Scalar = 0.0, weight_decay: Scalar = 0.0, mask: Mask = None, *,
         trust_mask: Mask = None, mu_dtype: StorageLike = None, nu_dtype: StorageLike = None,
         base_learning_rate: float | None = None, max_trust_ratio: Scalar | None = None,
         bias_correction: bool = True) -> Transformation:
    """LAMB: Adam's direction, scaled in each layer to the norm of its parameter.

        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps) + wd·p
        p ← p - lr·(‖p‖ / ‖u‖)·u          (ratio 1 where either norm is 0)

    The decay stands inside the ratio, as in the paper; with ``base_learning_rate`` it is outside.
    Arithmetic is in float32, for float64 leaves in float64.

    Args:
      learning_rate: the length of a step as a fraction of the parameter's norm, at least 0. Here
        and below a number may also be a 0-d array, a schedule (a function of the step) or
        ``inject(value)``.
      b1: the decay of the first moment in each step, in [0, 1).
      b2: the decay of the second moment in each step, in [0, 1).
      eps: added outside the root, at least 0, in units of the gradient.
      eps_root: added inside the root, at least 0; for derivatives through the step.
      weight_decay: the fraction of a parameter that is added to its direction, at least 0.
      mask: the leaves to decay: a tree of bools with the parameters' structure or a prefix of it, a
        function that makes one from the parameters, or `matching`; None for all.
      trust_mask: the leaves to scale by their norm, of the same kinds; None for all. Reference
        implementations leave biases and the scales of norms out of both:
        ``not_matching("bias", "scale")``.
      mu_dtype: how the first moment is stored, as in `lion`.
      nu_dtype: how the second moment is stored, as ``mu_dtype``.
      base_learning_rate: None, or the greatest learning rate ``α`` of the schedule, above 0: the
        decay is then ``(lr/α)·wd·p``, outside of the ratio and multiplied by the schedule alone.
      max_trust_ratio: upper bound of ``‖p‖ / ‖u‖``, at least 0; None for no bound (LAMBC).
      bias_correction: whether to divide the moments by ``1 - b1^t`` and ``1 - b2^t``.

    Raises:
      ValueError: for a number out of range, a storage dtype that is not floating-point, or, where
        it is used, a mask that does not fit the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.lamb(0.5)
    >>> params, _ = tx.step(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)), jnp.array([9.0, 9.0]))
    >>> [round(p, 4) for p in params.tolist()]
    [1.2322, 2.2322]

    References:
      You et al., Large Batch Optimization for Deep Learning, 2020, arXiv:1904.00962.
    """
    decay = _decay(weight_decay, mask, base_learning_rate)
    before, after = (decay, identity()) if base_learning_rate is None else (identity(), decay)
    max_ratio = named(max_trust_ratio, "max_trust_ratio")
    return chain(scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype,
                               bias_correction=bias_correction), before,
                 scale_by_trust_ratio(mask=trust_mask, max_ratio=max_ratio), after,
                 scale_by_learning_rate(learning_rate))


@constructor
def adam(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8,
         eps_root: Scalar = 0.0, mu_dtype: StorageLike = None, *, nesterov: bool = False,
         nu_dtype: StorageLike = None) -> Transformation:
    """Adam: each element's step is scaled by the root of its averaged square.

        p ← p - lr·(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps)
        m ← b1·m + (1 - b1)·g          v ← b2·v + (1 - b2)·g²

    It is `adamw` without decay.

    Args:
      learning_rate: as `adamw`, and so the others.
      b1: in [0, 1).
      b2: in [0, 1).
      eps: at least 0.
      eps_root: at least 0.
      mu_dtype: how the first moment is stored, as in `lion`.
      nesterov: whether to look ahead along the momentum.
      nu_dtype: how the second moment is stored, as ``mu_dtype``.

    Raises:
      ValueError: for a number out of range or a storage dtype that is not floating-point.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.adam(0.5)
    >>> params, _ = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([-3.0]))
    >>> [round(p, 4) for p in params.tolist()]
    [2.5]

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, arXiv:1412.6980.
    """
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, 0.0, nesterov=nesterov,
                 nu_dtype=nu_dtype)


@constructor
def adamw(learning_rate: Scalar, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8,
          eps_root: Scalar = 0.0, mu_dtype: StorageLike = None, weight_decay: Scalar = 1e-4,
          mask: Mask = None, *, nesterov: bool = False, nu_dtype: StorageLike = None,
          base_learning_rate: float | None = None) -> Transformation:
    """AdamW: `adam` with a decay that does not pass through the moments.

        p ← p - lr·((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t) + eps_root) + eps) + wd·p)
        m ← b1·m + (1 - b1)·g          v ← b2·v + (1 - b2)·g²

    Arithmetic is in float32, for float64 leaves in float64.

    Args:
      learning_rate: the size of a step, at least 0, in units of the parameter. Here and below a
        number may also be a 0-d array, a schedule (a function of the step) or ``inject(value)``.
      b1: the decay of the first moment in each step, in [0, 1).
      b2: the decay of the second moment in each step, in [0, 1).
      eps: added outside the root, at least 0, in units of the gradient.
      eps_root: added inside the root, at least 0; for derivatives through the step.
      mu_dtype: how the first moment is stored, as in `lion`.
      weight_decay: the fraction of a parameter that is subtracted in each step, per unit of
        learning rate; at least 0.
      mask: the leaves to decay: a tree of bools with the parameters' structure or a prefix of it, a
        function that makes one from the parameters, or `matching`; None for all.
      nesterov: whether to look ahead along the momentum, as in NAdam.
      nu_dtype: how the second moment is stored, as ``mu_dtype``.
      base_learning_rate: None, or the greatest learning rate ``α`` of the schedule, above 0: the
        decay is then ``(lr/α)·wd·p``, multiplied by the schedule alone.

    Raises:
      ValueError: for a number out of range, a storage dtype that is not floating-point, or, where
        it is used, a mask that does not fit the parameters.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.adamw(0.5, weight_decay=0.5)
    >>> params, _ = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([-3.0]))
    >>> [round(p, 4) for p in params.tolist()]
    [2.0]

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv:1711.05101.
    """
    return chain(scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nu_dtype=nu_dtype,
                               nesterov=nesterov),
                 _decay(weight_decay, mask, base_learning_rate),
                 scale_by_learning_rate(learning_rate))


@constructor
def sgd(learning_rate: Scalar, momentum: Scalar | None = None, nesterov: bool = False,
        accumulator_dtype: StorageLike = None, *, dampening: Scalar = 0.0,
        weight_decay: Scalar = 0.0, mask: Mask = None,
        base_learning_rate: float | None = None) -> Transformation:
    """Stochastic gradient descent, with momentum if asked for.

        g ← g + wd·p
        t ← momentum·t + (1 - dampening)·g
        p ← p - lr·t          (with Nesterov's look-ahead p - lr·(g + momentum·t))

    The decay is added to the gradient, before the momentum, as PyTorch does. With
    ``base_learning_rate`` it is decoupled: added after the momentum (SGDW). Arithmetic is in
    float32, for float64 leaves in float64.

    Args:
      learning_rate: the factor of the direction, at least 0. Here and below a number may also be a
        0-d array, a schedule (a function of the step) or ``inject(value)``.
      momentum: the decay of the sum of gradients in each step, in [0, 1]; None for plain descent,
        which has no slots.
      nesterov: whether to look ahead along the momentum.
      accumulator_dtype: how the sum is stored, as ``mu_dtype`` in `lion`.
      dampening: the fraction that is taken off each gradient but the first, in [0, 1]. Without
        momentum it has no effect.
      weight_decay: the fraction of a parameter that is added to its gradient, at least 0.
      mask: the leaves to decay: a tree of bools with the parameters' structure or a prefix of it, a
        function that makes one from the parameters, or `matching`; None for all.
      base_learning_rate: None, or the greatest learning rate ``α`` of the schedule, above 0: the
        decay is then ``(lr/α)·wd·p``, after the momentum and multiplied by the schedule alone.

    Raises:
      ValueError: for a number out of range, a storage dtype that is not floating-point,
        ``nesterov`` without momentum or with dampening, or, where it is used, a mask that does not
        fit.

    >>> import jax.numpy as jnp, lionax
    >>> tx = lionax.sgd(0.5, momentum=0.5)
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(jnp.zeros(1)), jnp.array([1.0]))
    >>> params, state = tx.step(params, state, jnp.array([1.0]))
    >>> params.tolist()
    [0.75]

    References:
      Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, 2013.
    """
    if nesterov and momentum is None:
        raise ValueError("sgd: nesterov=True looks ahead along the momentum, which is None; give "
                         "momentum=0.9, for example")
    decay = _decay(weight_decay, mask, base_learning_rate)
    before, after = (decay, identity()) if base_learning_rate is None else (identity(), decay)
    momentum_part = (identity() if momentum is None else
                     trace(named(momentum, "momentum"), nesterov, accumulator_dtype,
                           dampening=dampening))
    return chain(before, momentum_part, after, scale_by_learning_rate(learning_rate))
