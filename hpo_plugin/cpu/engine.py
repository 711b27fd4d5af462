"""verl's FSDP engine on CPU tensors (FSDP2 only)."""

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from verl.trainer.config import CheckpointConfig
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from hpo_plugin.cpu.checks import require_fsdp2


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):
    """The language-model engine of verl for ``actor_rollout_ref.{actor,ref}.strategy=fsdp2`` on CPU.

    ``fsdp`` is also registered, so that its error message states what to do.
    """

    def __init__(
        self,
        model_config: HFModelConfig,
        engine_config: FSDPEngineConfig,
        optimizer_config: FSDPOptimizerConfig,
        checkpoint_config: CheckpointConfig,
    ) -> None:
        """Check the strategy, then build verl's engine.

        Args:
            model_config: ``actor_rollout_ref.model``.
            engine_config: ``fsdp_config`` of the role.
            optimizer_config: ``optim`` of the role.
            checkpoint_config: ``checkpoint`` of the role.

        Raises:
            ValueError: The strategy is not fsdp2.
        """
        require_fsdp2(engine_config.strategy)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        if not self.engine_config.forward_only:
            return super()._build_fsdp_module(module)
        # verl shards a forward-only model (the reference) with CPUOffloadPolicy(pin_memory=True). Without an
        # accelerator torch cannot pin memory and raises. The parameters are in CPU memory in any case.
        self._is_offload_param = False
        self._is_offload_optimizer = False
        mixed_precision = self.engine_config.mixed_precision or {}
        param_dtype = PrecisionType.to_dtype(mixed_precision.get("param_dtype", "bf16"))
        reduce_dtype = PrecisionType.to_dtype(mixed_precision.get("reduce_dtype", "fp32"))
        self._autocast_dtype = param_dtype
        self.scaler = None
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=True)
        full_state = module.state_dict()
        fsdp_kwargs = {
            "mesh": self.device_mesh,
            "mp_policy": policy,
            "reshard_after_forward": self.engine_config.reshard_after_forward,
        }
        apply_fsdp2(module, fsdp_kwargs, self.engine_config)
        fsdp2_load_full_state_dict(module, full_state, self.device_mesh, None)
        return module
