//! x · Wᵀ with a frozen weight: candle's own product would compute the gradient of W too, a third of all arithmetic.

use candle_core::backend::BackendStorage as _;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

/// (rows, inputs) × (outputs, inputs) → (rows, outputs)
pub fn frozen_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op1(FrozenLinear { weight: weight.clone() })
}

struct FrozenLinear {
    /// (outputs, inputs)
    weight: Tensor,
}

// === impl FrozenLinear ===

impl FrozenLinear {
    /// (batch, rows, outputs, inputs), as products of storages want it.
    fn sizes(&self, layout: &Layout) -> Result<(usize, usize, usize, usize)> {
        let (outputs, inputs) = self.weight.dims2()?;
        let (rows, width) = layout.shape().dims2()?;
        if width != inputs {
            bail!("a linear layer of {inputs} inputs got {width}");
        }
        Ok((1, rows, outputs, inputs))
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes @ (_, rows, outputs, _) = self.sizes(layout)?;
        let transposed = self.weight.t()?;
        let (weight, weight_layout) = transposed.storage_and_layout();
        let Storage::Cpu(weight) = &*weight else {
            bail!("a frozen weight is on another device than its input")
        };
        Ok((x.matmul(weight, sizes, layout, weight_layout)?, (rows, outputs).into()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let sizes @ (_, rows, outputs, _) = self.sizes(layout)?;
        let transposed = self.weight.t()?;
        let (weight, weight_layout) = transposed.storage_and_layout();
        let Storage::Cuda(weight) = &*weight else {
            bail!("a frozen weight is on another device than its input")
        };
        Ok((x.matmul(weight, sizes, layout, weight_layout)?, (rows, outputs).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        gradient.contiguous()?.matmul(&self.weight).map(Some)
    }
}
