"""How long it takes: said before, and shown while it goes on."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import tqdm

from wf_vit.models.recording import bytes_per_image
from wf_vit.models.vit import ViT

_LOG = logging.getLogger(__name__)

# Share of the speed of plain matrix products that the measurement reaches, seconds to
# compile and to draw, and memory in recordings: seen on two CPU cores.
_EFFICIENCY, _COMPILATION, _DRAWING, _RECORDINGS = 0.5, 12.0, 4.0, 8
# Forward passes that a probe is worth, and finding out which patches can go, likewise.
_PROBE, _REMOVAL = 1.4, 200
# Without a terminal: seconds between two lines.
_LINE_EVERY = 20.0


def passes(
    num_probes: int, *, propagated: bool, of_class: bool, removal: bool = False
) -> int:
    """Returns how many forward passes a measurement is worth, seen on two CPU cores."""
    count = 1
    if propagated:
        count += 2 if of_class else round(_PROBE * num_probes)
    return count + _REMOVAL * removal


def operations(model: ViT) -> int:
    """Returns the floating-point operations of a forward pass of one image."""
    tokens, width = model.num_tokens, model.width
    kernels = 4 * width**2 + 2 * width * model.mlp_dim
    return 2 * model.depth * tokens * (kernels + 2 * tokens * width)


def expected(model: ViT, forward_passes: int) -> tuple[float, str]:
    """Returns about how many seconds an image takes here, and that in words."""
    count = forward_passes * operations(model)
    seconds = count / (_EFFICIENCY * _speed())
    memory = _RECORDINGS * bytes_per_image(model)
    return seconds, (
        f"about {max(seconds, 1):.0f} s each here ({count / 1e9:,.3g} GFLOP, as much "
        f"as {forward_passes} forward passes; {memory / 1e9:.2g} GB of memory), about "
        f"{_DRAWING:.0f} s to draw it, and the first time about {_COMPILATION:.0f} s "
        "of compilation"
    )


def _speed() -> float:
    """Returns the floating-point operations a second of a matrix product."""
    side = 1024
    product = jax.jit(jnp.matmul)
    matrix = jnp.ones((side, side))
    product(matrix, matrix).block_until_ready()
    start = time.perf_counter()
    product(matrix, matrix).block_until_ready()
    return 2 * side**3 / (time.perf_counter() - start)


class Progress:
    """A bar over images that moves while one of them is measured.

    On a terminal a bar with the time left; else a line at times.
    """

    def __init__(self, total: int, seconds: float):
        """Starts the bar.

        Args:
          total: number of images.
          seconds: about how long an image takes; corrected by those that are done.
        """
        self._total, self._done = total, 0
        self._times: list[tuple[float, int]] = []
        self._seconds, self._first = seconds + _DRAWING, _COMPILATION
        self._bar = tqdm.tqdm(
            total=total,
            unit=" images",
            disable=None,
            bar_format="{percentage:3.0f}% |{bar}| {desc}",
        )
        self._said = time.perf_counter()

    @contextlib.contextmanager
    def images(self, count: int) -> Iterator[None]:
        """Moves the bar over so many images while what is inside runs."""
        start, stop = time.perf_counter(), threading.Event()
        ticker = threading.Thread(
            target=self._tick, args=(start, count, stop), daemon=True
        )
        ticker.start()
        try:
            yield
        finally:
            stop.set()
            ticker.join()
        took = time.perf_counter() - start
        # The first ones also waited for the compiler: they say least.
        self._times.append((took, count) if self._done else (self._seconds, 1))
        self._seconds = sum(t for t, _ in self._times) / sum(n for _, n in self._times)
        self._first = 0.0
        self._done += count
        self._show(float(self._done), self._later(0))

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _later(self, count: int) -> float:
        """Returns the seconds that the images after the next ``count`` take."""
        return self._seconds * (self._total - self._done - count)

    def _tick(self, start: float, count: int, stop: threading.Event) -> None:
        whole = self._first + self._seconds * count
        while True:
            passed = (time.perf_counter() - start) / whole
            # It may take longer than expected: the bar slows down, and never ends.
            share = passed if passed < 0.8 else 1 - 0.16 / passed
            place = self._done + count * share
            self._show(place, whole * (1 - share) + self._later(count))
            if stop.wait(0.5):
                return

    def _show(self, place: float, left: float) -> None:
        text = (
            f"{self._done} of {self._total} images, about "
            f"{tqdm.tqdm.format_interval(left)} left"
        )
        if not self._bar.disable:
            self._bar.n = min(place, self._total)
            self._bar.set_description_str(text)
            return
        now = time.perf_counter()
        if now - self._said >= _LINE_EVERY:
            self._said = now
            _LOG.info(text)
