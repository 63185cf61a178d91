//! What numbers are while they travel.

use half::bf16;

/// How a number travels. All ranks of a group agree on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Payload {
    #[default]
    F32,
    /// Half the bytes; 8 bits of precision.
    Bf16,
}

// === impl Payload ===

impl Payload {
    pub(crate) fn bytes_per_number(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Leaves of each number what a peer gets of it.
    pub(crate) fn round(self, values: &mut [f32]) {
        if self == Self::Bf16 {
            values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        }
    }
}
