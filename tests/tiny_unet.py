"""A small stand-in for the UNet2DConditionModel of diffusers: the same paths and module types, a forward of its own."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

TIME, TEXT = 16, 12


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x, context):
        y = F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        return self.to_out[1](self.to_out[0](y))


class GEGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 2 * width), nn.Dropout(0.0), nn.Linear(2 * width, width)])

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, TEXT)
        self.ff = FeedForward(width)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x), self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """`linear` projects tokens by nn.Linear (Stable Diffusion 2 and XL), else pixels by 1x1 convolutions (1.x)."""

    def __init__(self, width, linear):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width)])
        self.linear = linear

    def forward(self, x, context):
        shape = x.shape
        y = self.norm(x)
        y = self.proj_in(y.flatten(2).mT) if self.linear else self.proj_in(y).flatten(2).mT
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + (self.proj_out(y).mT.reshape(shape) if self.linear else self.proj_out(y.mT.reshape(shape)))


class ResnetBlock2D(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, out)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(TIME, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Sampler2D(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)


class Block2D(nn.Module):
    """One resolution: residual blocks with attention after the first, and a way to the next resolution or none."""

    def __init__(self, widths, linear, sampler=None):
        super().__init__()
        pairs = list(pairwise(widths))
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out) for width, out in pairs)
        self.attentions = nn.ModuleList([Transformer2DModel(widths[1], linear)])
        if sampler:
            self.add_module(sampler, nn.ModuleList([Sampler2D(widths[-1], 2 if sampler == "downsamplers" else 1)]))

    def forward(self, x, time, context):
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if index == 0:
                x = self.attentions[0](x, context)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0].conv(x)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0].conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class TimestepEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(4, TIME), nn.Linear(TIME, TIME)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet2DConditionModel(nn.Module):
    """One block down, the middle, one block up, with 8 and 12 channels; the skip comes from `conv_in`."""

    def __init__(self, linear):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time_embedding = TimestepEmbedding()
        self.down_blocks = nn.ModuleList([Block2D([8, 12], linear, "downsamplers")])
        self.mid_block = Block2D([12, 12, 12], linear)
        self.up_blocks = nn.ModuleList([Block2D([12, 12], linear, "upsamplers"), Block2D([20, 8], linear)])
        self.conv_norm_out = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states):
        time = self.time_embedding(timestep)
        skip = self.conv_in(sample)
        x = self.down_blocks[0](skip, time, encoder_hidden_states)
        x = self.mid_block(x, time, encoder_hidden_states)
        x = self.up_blocks[0](x, time, encoder_hidden_states)
        x = self.up_blocks[1](torch.cat([x, skip], dim=1), time, encoder_hidden_states)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
