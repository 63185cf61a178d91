//! Where a worker's model computes: on the CPU, or on a GPU.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use uniarm_collective::Nccl;
use uniarm_cuda::{CudaLanes, CudaLlama, CudaOptions, WeightFormat};
use uniarm_model::{Forward, LlamaOptions, ModelFiles, Part, RowLanes, Shard};
use uniarm_trainer::network::DeviceName;

use crate::{
    args::EngineArgs,
    worker::{self, Loaded, Threads},
};

#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Where the model computes: cpu, cuda, or cuda:N for the GPU of number N (docs/gpu.md)
    #[arg(long, env = "UNIARM_DEVICE", default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// What a GPU holds weights in
    #[arg(long, env = "UNIARM_GPU_WEIGHTS", value_enum, default_value = "bf16")]
    pub gpu_weights: GpuWeights,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GpuWeights {
    Bf16,
    /// To compare with the CPU
    F32,
}

/// A worker's model.
pub struct Model {
    pub files: ModelFiles,
    pub forward: Box<dyn Forward>,
    /// Of whole rows from its device, or to it.
    pub lanes: Option<Arc<dyn RowLanes>>,
}

// === impl Model ===

impl Model {
    /// One whose rows are on the host, or on several devices.
    pub fn without_lanes(files: ModelFiles, forward: Box<dyn Forward>) -> Self {
        Self { files, forward, lanes: None }
    }
}

// === impl DeviceArgs ===

impl DeviceArgs {
    /// Opens and loads a model where it is to compute, and tries it. An end of a lane that does not hear of the other one for
    /// `timeout` closes it.
    pub async fn load(
        self,
        source: String,
        (engine, share): (&EngineArgs, Threads),
        timeout: Duration,
    ) -> anyhow::Result<Model> {
        let DeviceName::Cuda(device) = self.device else {
            let Loaded { files, llama } = worker::load(source, engine, share).await?;
            return Ok(Model::without_lanes(files, Box::new(llama)));
        };
        let options = self.cuda_options(device, &worker::llama_options(engine, share));
        let loading = tokio::task::spawn_blocking(move || {
            let files = worker::open(&source)?;
            let mut llama = CudaLlama::load(&files, &options)
                .with_context(|| format!("cannot load the model {source} on --device cuda:{device}"))?;
            worker::self_test(&mut llama).with_context(|| {
                format!("the model {source} fails its self-test on --device cuda:{device}")
            })?;
            let (weights, name) = (llama.weight_bytes(), llama.device_name());
            tracing::info!(device = name, weights, "the model computes on a GPU");
            let lanes = Arc::new(CudaLanes::new(device, timeout));
            anyhow::Ok(Model { files, forward: Box::new(llama), lanes: Some(lanes) })
        });
        loading.await.context("loading the model panicked")?
    }

    /// Loads one rank's part of a model where it is to compute.
    pub fn load_part(self, files: &ModelFiles, options: &LlamaOptions, part: Part) -> anyhow::Result<Shard> {
        let DeviceName::Cuda(device) = self.device else { return Ok(Shard::load(files, options, part)?) };
        // A rank that has no way to the others says so before it reads the weights.
        Nccl::version()?;
        let llama = CudaLlama::load_part(files, &self.cuda_options(device, options), part)?;
        Ok(Shard::over(Box::new(llama)))
    }

    fn cuda_options(self, device: usize, options: &LlamaOptions) -> CudaOptions {
        let LlamaOptions { kv_blocks, block_tokens, .. } = *options;
        CudaOptions { device, kv_blocks, block_tokens, weights: self.gpu_weights.into(), graphs: true }
    }
}

// === impl GpuWeights ===

impl From<GpuWeights> for WeightFormat {
    fn from(weights: GpuWeights) -> Self {
        match weights {
            GpuWeights::Bf16 => Self::Bf16,
            GpuWeights::F32 => Self::F32,
        }
    }
}
