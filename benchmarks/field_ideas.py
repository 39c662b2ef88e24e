# ruff: noqa
r"""Ideas for learned fields, as they were tried on all of CIFAR-10; one run each.

    python -m benchmarks.field_ideas --data cifar10.npz --kind gauss --opt '{"hidden":32}'

It replaces the attention of a WinfT by one that has every idea. KIND is "gauss" (see
OPT below), "two" (two Gaussians a head), "profile" and "context" (free tables of
displacements), "moment" (fields from the moments of a first attention), or the name of
a model of the registry. OPT: "static" (no patch predicts), "ring" (centres start on a
ring around the patch), "hidden" (width of a hidden layer), "tilt", "w" (first width, as
a share of the radius), "rel" (centres in widths), "where" (heads report where they
listen: 1, or "linear", "moments" or "spread" for a part of it).
"""
import math
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from wf_vit.models import block, attention, windowfree

def install(kind, opt):
    counter = {'n': 0}

    class Attn(nn.Module):
        num_heads: int
        field: object = None
        qkv_bias: bool = True
        rotary: object = None
        relative_positions: bool = False
        grid: object = None
        dtype: object = jnp.float32

        @nn.compact
        def __call__(self, x, bias=None, record=False, patches=None):
            H = self.num_heads
            width = x.shape[-1]
            def project(name):
                return nn.DenseGeneral((H, width // H), kernel_init=nn.initializers.xavier_uniform(), name=name)(x)
            q, k, v = project('query'), project('key'), project('value')
            maker = self.field(num_heads=H, name='field')  # PredictedFields: only its config
            grid, layer = maker.grid, maker.layer
            GH, GW = grid
            P = GH * GW
            yy, xx = np.divmod(np.arange(P), GW)
            pos = np.stack([xx, yy], -1).astype(np.float32)
            d = pos[None] - pos[:, None]  # [i, j, 2]
            growth = opt.get('growth', 1.0); first = opt.get('first', 1.0)
            radius = min(first + growth * layer, max(grid) - 1)
            s0 = radius * opt.get('w', 1 / 1.5)
            ring = opt.get('ring', 0.0) * (radius if opt.get('ringscale') else 1.0)
            phase = layer * opt.get('twist', 1.0)
            angle = 2 * np.pi * np.arange(H) / H + phase
            mu0 = ring * np.stack([np.cos(angle), np.sin(angle)], -1)
            if opt.get('nring'):  # last head central
                mu0[-1] = 0
            hidden = opt.get('hidden', 0)
            feats = x
            def predict(n, name):
                """[B,P,H,n], zero at first."""
                if opt.get('static'):
                    return self.param(name, nn.initializers.zeros, (H, n))[None, None]
                h = feats
                if hidden:
                    h = nn.gelu(nn.Dense(hidden, name=name + '_h')(h))
                out = nn.DenseGeneral((H, n), kernel_init=nn.initializers.zeros, name=name)(h)
                return out * opt.get('scale', 1.0)
            B = x.shape[0]
            def gaussian(tag='', mu0=mu0, s0=s0):
                raw = predict(5 if opt.get('tilt') else 4, 'g' + tag)
                raw = jnp.moveaxis(raw, 2, 1)
                bound = opt.get('bound', 2.0)
                logs = bound * jnp.tanh(raw[..., 2:4] / bound)
                if opt.get('rel'):
                    mu = (mu0[None, :, None] / s0 + raw[..., :2]) * jnp.exp(logs) * s0
                else:
                    mu = mu0[None, :, None] + raw[..., :2] * s0
                inv = jnp.exp(-logs) / s0
                cols = ((np.arange(GW)[None, None, None] - pos[:, 0][None, None, :, None]) - mu[..., :1]) * inv[..., :1]
                rows = ((np.arange(GH)[None, None, None] - pos[:, 1][None, None, :, None]) - mu[..., 1:]) * inv[..., 1:2]
                lm = -0.5 * (jnp.square(rows)[..., :, None] + jnp.square(cols)[..., None, :])
                if opt.get('tilt'):
                    rho = 0.9 * jnp.tanh(raw[..., 4])[..., None, None]
                    lm = (lm + rho * rows[..., :, None] * cols[..., None, :]) / (1 - rho ** 2)
                return lm.reshape(*lm.shape[:-2], P)
            if kind == 'gauss':
                fb = gaussian()
                if opt.get('amp'):  # learned strength by head
                    fb = fb * jnp.exp(self.param('amp', nn.initializers.zeros, (H,)))[None, :, None, None]
            elif kind == 'two':
                far = gaussian('far', mu0=-mu0 if ring else mu0, s0=opt.get('far', 2.0) * s0)
                w = jnp.moveaxis(predict(1, 'mix'), 2, 1) + opt.get('mix', -1.0)
                fb = jnp.logaddexp(gaussian(), w + far)
            elif kind == 'profile':
                r = opt.get('r', 8)
                def table(n, name, centre):
                    off = np.arange(-(n - 1), n)
                    st = -0.5 * (off[None] - centre[:, None]) ** 2 / s0 ** 2
                    return self.param('st' + name, lambda key: jnp.asarray(np.maximum(st, -12), jnp.float32)), self.param('dy' + name, nn.initializers.normal(0.02), (H, 2 * n - 1, r))
                sy, ty = table(GH, 'y', mu0[:, 1]); sx, tx = table(GW, 'x', mu0[:, 0])
                iy = np.arange(GH)[None] - np.arange(GH)[:, None] + GH - 1  # [query, key]
                ix = np.arange(GW)[None] - np.arange(GW)[:, None] + GW - 1
                if opt.get('static'):
                    rows = sy[:, iy][None, :, :, None]; cols = sx[:, ix][None, :, None]
                else:
                    g = nn.DenseGeneral((H, r), kernel_init=nn.initializers.lecun_normal(), name='g')(feats)
                    g = g.reshape(B, GH, GW, H, r)
                    rows = jnp.einsum('byxhr,hykr->bhyxk', g, ty[:, iy]) + sy[:, iy][None, :, :, None]
                    cols = jnp.einsum('byxhr,hxkr->bhyxk', g, tx[:, ix]) + sx[:, ix][None, :, None]
                rows = jnp.broadcast_to(rows, (rows.shape[0], H, GH, GW, GH)); cols = jnp.broadcast_to(cols, (cols.shape[0], H, GH, GW, GW))
                fb = (rows[..., :, None] + cols[..., None, :]).reshape(-1, H, P, P)
            elif kind == 'context':  # full 2d contextual relative positions
                r = opt.get('r', 8)
                st0 = -0.5 * (np.square(d[None] - mu0[:, None, None]).sum(-1)) / s0 ** 2
                ind = (d[..., 1] + GH - 1) * (2 * GW - 1) + d[..., 0] + GW - 1
                ind = np.asarray(ind, int)
                n = (2 * GH - 1) * (2 * GW - 1)
                oy, ox = np.divmod(np.arange(n), 2 * GW - 1)
                st = -0.5 * ((ox - GW + 1 - mu0[:, :1]) ** 2 + (oy - GH + 1 - mu0[:, 1:]) ** 2) / s0 ** 2
                st = self.param('st', lambda key: jnp.asarray(np.maximum(st, -12), jnp.float32))
                fb = st[:, ind][None]
                if not opt.get('static'):
                    t = self.param('t', nn.initializers.normal(0.02), (H, n, r))
                    g = nn.DenseGeneral((H, r), kernel_init=nn.initializers.lecun_normal(), name='g')(feats)
                    fb = fb + jnp.einsum('bihr,hijr->bhij', g, t[:, ind])
            elif kind == 'moment':
                r = opt.get('r', 8)
                prior = -0.5 * np.square(d[None] - mu0[:, None, None]).sum(-1) / (opt.get('wide', 2.0) * s0) ** 2
                a, b = (nn.DenseGeneral((H, r), kernel_init=nn.initializers.xavier_uniform(), name=n)(x) for n in ('fq', 'fk'))
                l = jnp.einsum('bihr,bjhr->bhij', a, b) / math.sqrt(r) + prior[None]
                A = jax.nn.softmax(l)
                m1 = jnp.einsum('bhij,jc->bhic', A, pos)
                m2 = jnp.einsum('bhij,jc->bhic', A, pos ** 2)
                var = jnp.maximum(m2 - m1 ** 2, 0.) 
                al = jnp.exp(self.param('al', nn.initializers.zeros, (H, 2)))[None, :, None] * opt.get('al', 0.5)
                inv = jax.lax.rsqrt(al * var + 0.1)
                z = (pos[None, None, None] - m1[..., None, :]) * inv[..., None, :]
                fb = -0.5 * jnp.square(z).sum(-1)
            else:
                raise ValueError(kind)
            if opt.get('where'):
                logits = jnp.einsum('bnhk,bmhk->bhnm', q * (q.shape[-1] ** -0.5), k) + fb
                w = jax.nn.softmax(logits)
                o = jnp.einsum('bhnm,bmhk->bnhk', w, v)
                m1 = jnp.einsum('bhij,jc->bihc', w, pos) - pos[None, :, None]
                m2 = jnp.einsum('bhij,jc->bihc', w, pos ** 2)
                var = jnp.maximum(m2 - (m1 + pos[None, :, None]) ** 2, 0)
                if opt['where'] == 'linear':
                    extra = m1 / 4.0
                elif opt['where'] == 'moments':
                    c = (pos - 3.5) / 2.3
                    extra = jnp.einsum('bhij,jc->bihc', w, np.concatenate([c, c ** 2], -1))
                elif opt['where'] == 'spread':
                    extra = jnp.log(var + 0.1)
                else:
                    extra = jnp.concatenate([m1 / s0, jnp.log(var + 0.1)], -1)
                o = jnp.concatenate([o, extra], -1)
            else:
                o = jnp.einsum('bhnm,bmhk->bnhk', jax.nn.softmax(jnp.einsum('bnhk,bmhk->bhnm', q * (q.shape[-1] ** -0.5), k) + fb), v)
            o = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=nn.initializers.xavier_uniform(), name='out')(o)
            return o, None, {}
    block.SelfAttention = Attn
    from wf_vit.models import vit
    if hasattr(vit, 'SelfAttention'): vit.SelfAttention = Attn


import sys, json, time, functools, math
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from benchmarks import sweep
from wf_vit import grid as geometry
from wf_vit.models import windowfree, controls, registry
from wf_vit.models.controls import PositionBias, among, GaussianBias
import argparse
p = argparse.ArgumentParser()
p.add_argument('--kind', required=True)
p.add_argument('--seeds', default='0')
p.add_argument('--images', type=int, default=0)
p.add_argument('--epochs', type=float, default=8)
p.add_argument('--width', type=int, default=48)
p.add_argument('--depth', type=int, default=4)
p.add_argument('--batch', type=int, default=64)
p.add_argument('--lr', type=float, default=2e-3)
p.add_argument('--eval', type=float, default=2)
p.add_argument('--opt', default='{}')
p.add_argument('--cfg', default='{}')
p.add_argument('--out', default='ideas.jsonl')
p.add_argument('--data', default='cifar10.npz')
a = p.parse_args()
opt = json.loads(a.opt)
from configs import cifar10
cfg = cifar10.get_config('vit').copy_and_resolve_references().unlock()
cfg.model.update(width=a.width, mlp_dim=4*a.width, depth=a.depth)
cfg.batch_size = a.batch
cfg.optimizer.learning_rate = a.lr
cfg.total_epochs = a.epochs; cfg.eval_epochs = a.eval
cfg.model.name = a.kind if a.kind in registry.MODELS else (install(a.kind, opt) or 'windowfree')
cfg.update_from_flattened_dict(json.loads(a.cfg))
splits, names = sweep.load(Path(a.data))
data = {'train': sweep.on_device(splits['train'], a.images), 'test': sweep.on_device(splits['test'], 0)}
t0 = time.time(); c0 = time.process_time()
s = sweep.Sweep(cfg, [int(x) for x in a.seeds.split(',')], data['train'], data['test'], names)
rows = []
for row in s.run():
    rows.append(row)
    print(a.kind, a.opt, row['epoch'], [round(100*x, 2) for x in row['test/top1']], round(row['train_images_per_second']), f'{time.time()-t0:.0f}s', flush=True)
n = sum(x[0].size for x in jax.tree.leaves(s.states.params))
with open(a.out, 'a') as f:
    f.write(json.dumps(dict(kind=a.kind, opt=opt, cfg=a.cfg, seeds=a.seeds, images=a.images, epochs=a.epochs, width=a.width, depth=a.depth, batch=a.batch, lr=a.lr, params=n, top1=[100*x for x in rows[-1]['test/top1']], curve=[[r['epoch']]+[100*x for x in r['test/top1']] for r in rows], trainloss=rows[-1]['train/loss'], ips=rows[-1]['train_images_per_second'], secs=time.time()-t0)) + '\n')
