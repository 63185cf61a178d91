//! What a network is trained on: the CPU, or a GPU where the binary was built for one.

use std::{fmt, str::FromStr};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::ops::Form;

/// `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    #[default]
    Cpu,
    /// By its number among the GPUs that this process sees.
    Cuda(usize),
}

// === impl DeviceName ===

impl DeviceName {
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }

    /// The device, and the form in which operations run there.
    ///
    /// # Errors
    /// For a GPU that is not there, or that this binary was not built for.
    pub fn open(self) -> anyhow::Result<(Device, Form)> {
        match self {
            Self::Cpu => Ok((Device::Cpu, Form::Fast)),
            Self::Cuda(ordinal) => Ok((open_gpu(ordinal)?, Form::Plain)),
        }
    }
}

#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize) -> anyhow::Result<Device> {
    use anyhow::Context as _;
    Device::new_cuda(ordinal)
        .with_context(|| format!("device is cuda:{ordinal}, which cannot be used; nvidia-smi lists the GPUs"))
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(ordinal: usize) -> anyhow::Result<Device> {
    anyhow::bail!(
        "device is cuda:{ordinal}, and this binary was built for CPUs alone; build it with --features cuda"
    )
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is no device; it may be cpu, cuda, or cuda:N for the GPU of number N");
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_read_and_written() {
        for (text, name) in
            [("cpu", DeviceName::Cpu), ("cuda", DeviceName::Cuda(0)), ("cuda:3", DeviceName::Cuda(3))]
        {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            let error = text.parse::<DeviceName>().unwrap_err();
            assert!(error.contains("cpu, cuda, or cuda:N"), "{error}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_binary_for_cpus_says_how_to_build_one_for_gpus() {
        let error = DeviceName::Cuda(1).open().unwrap_err().to_string();
        assert_eq!(
            error,
            "device is cuda:1, and this binary was built for CPUs alone; build it with --features cuda"
        );
    }
}
