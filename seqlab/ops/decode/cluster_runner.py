"""What runs the back ends `solo` and `clustered`: a stack whose mixers are shared by the blocks of a cluster, one launch for many tokens."""

import torch
from torch import Tensor

from seqlab.ops import nvrtc
from seqlab.ops.decode import persistent
from seqlab.ops.decode.program import Carried, Operation
from seqlab.ops.decode.request import Request
from seqlab.ops.decode.sampling import Sampling


class ClusterRunner:
    """Runs the tokens of all streams; the kernel takes the states from memory and puts them back. Whoever inherits sets `batch`,
    `sizes`, `_torch_device`, `_program` and `_module`, says how weights are packed, and then calls `_hold`."""

    source: str
    kernel: str
    threads: int

    @property
    def _clusters(self) -> int:
        """How many run."""
        raise NotImplementedError

    def _layer(self, o: Operation) -> dict[str, Tensor]:
        """A mixer's weights."""
        raise NotImplementedError

    def _head(self, parts: list[Tensor]) -> Tensor:
        """The rows (head_rows d_model) of every block."""
        raise NotImplementedError

    def _hold(self, request: Request) -> None:
        """Everything that does not change from launch to launch, on the device."""
        s, program = self.sizes, self._program
        operations = program.operations
        self._carried = Carried(program, request.batch, request.device)
        self._kept: list[Tensor] = []
        bias = torch.zeros(program.vocab_size, device=request.device)
        if request.allowed is not None:
            bias = bias.masked_fill(~request.allowed, -torch.inf)
        base = None if request.base is None else request.base.float()
        shifts = [None if o.shift is None else o.shift[request.classes] for o in operations]
        if shifts[0] is not None:
            base = shifts[0] if base is None else base + shifts[0]
        head = program.head.new_zeros(s.cluster * s.head_rows, s.d_model)
        head[: program.vocab_size] = program.head
        layers = [self._layer(o) for o in operations]
        together = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        addresses = {name: [t.data_ptr() for t in getattr(self._carried, name)] for name in ("conv", "ssm")}
        tensors = together | {
            "head": self._head(list(head.split(s.head_rows))),
            "head_bias": bias,
            "embedding": program.embedding,
            "base": base,
            "shifts": None if shifts[0] is None else torch.stack(shifts),
            **{name: torch.tensor(value, device=request.device) for name, value in addresses.items()},
        }
        self._fixed = {name: 0 if t is None else self._keep(t) for name, t in tensors.items()}
        self._fixed |= {"layers": len(operations), "batch": request.batch}

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def load(self, state) -> None:
        """Take over the backbone's state."""
        self._carried.load(state)

    def state(self):
        """The backbone's state after all tokens so far."""
        return self._carried.state()

    def run(
        self, token: Tensor, position: int, n: int, sampling: Sampling, keys: Tensor, forced: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """n tokens a stream, (b n) int64, and their log-probabilities (b n); see Decoder."""
        def launch(token: Tensor, keys: Tensor, forced: Tensor | None, start: int, n: int):
            return self._launch(token, keys, forced, position + start, n, sampling)

        return persistent.in_launches(self._torch_device, launch, token, n, keys, forced)

    def _launch(self, token: Tensor, keys: Tensor, forced: Tensor | None, position: int, n: int, sampling: Sampling):
        device = self._torch_device
        tokens = torch.empty(self.batch, n, dtype=torch.int64, device=device)
        log_probs = torch.empty(self.batch, n, device=device)
        settings = torch.tensor([self._program.epsilon, sampling.temperature, sampling.top_p], device=device)
        p = nvrtc.params_type(self.source)()
        for name, value in self._fixed.items():
            setattr(p, name, value)
        p.settings, p.keys, p.tokens = settings.data_ptr(), keys.data_ptr(), token.data_ptr()
        p.forced = 0 if forced is None else forced.data_ptr()
        p.out, p.log_probs = tokens.data_ptr(), log_probs.data_ptr()
        p.count, p.position, p.top_k = n, position, sampling.top_k
        self._module.launch(self.kernel, self._clusters * self.sizes.cluster, self.threads, self.sizes.shared, p)
        return tokens, log_probs
