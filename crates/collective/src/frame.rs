//! What stands before the bytes of a message: who may read them, and as what.
//!
//! A message travels in frames of at most [`FRAME_BYTES_MAX`]; each has a header of its own, so that whatever is late, of
//! another group or of another call is recognised before a byte of it is taken.

use crate::{CollectiveError, Operation};

#[cfg(target_endian = "big")]
compile_error!("numbers travel as they lie in memory, which is little-endian");

/// Bytes of a frame without its header: after so many, the reader knows again what it reads.
pub(crate) const FRAME_BYTES_MAX: usize = 1 << 20;
pub(crate) const HEADER_BYTES: usize = 32;

/// "UCF1"
const MAGIC: u32 = u32::from_le_bytes(*b"UCF1");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) operation: Operation,
    pub(crate) epoch: u64,
    /// Frames that the sender sent to this receiver before.
    pub(crate) sequence: u64,
    /// Of the message whose frame this is.
    pub(crate) message_bytes: u64,
    pub(crate) frame_bytes: u32,
}

// === impl Header ===

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        // The operation takes the top byte of the frame's length, which needs 21 bits.
        let length = self.frame_bytes | u32::from(self.operation.number()) << 24;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.message_bytes.to_le_bytes());
        bytes
    }

    /// Refuses what is not the frame that is expected from `rank`.
    pub(crate) fn check(&self, bytes: &[u8; HEADER_BYTES], rank: usize) -> Result<(), CollectiveError> {
        if *bytes == self.encode() {
            return Ok(());
        }
        let what = self.difference(bytes);
        Err(CollectiveError::Mismatch { operation: self.operation, rank, what })
    }

    fn difference(&self, bytes: &[u8; HEADER_BYTES]) -> String {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (magic, length) = (word(0) as u32, (word(0) >> 32) as u32);
        if magic != MAGIC {
            return "sends something that is no frame".to_owned();
        }
        let (epoch, sequence, message_bytes) = (word(8), word(16), word(24));
        if epoch != self.epoch {
            return format!("sends for epoch {epoch} of the group, not {}", self.epoch);
        }
        if sequence != self.sequence {
            return format!("sends frame {sequence}, not {}: one is lost or repeated", self.sequence);
        }
        match Operation::from_number((length >> 24) as u8) {
            Some(operation) if operation == self.operation && message_bytes == self.message_bytes => {
                format!("sends a frame of {} bytes, not {}", length & 0xff_ffff, self.frame_bytes)
            }
            Some(operation) => {
                let expected = self.message_bytes;
                format!(
                    "calls {operation} and sends {message_bytes} bytes, not {} and {expected}",
                    self.operation
                )
            }
            None => format!("calls operation {}, which does not exist", length >> 24),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_frame_that_is_expected_is_taken() {
        let expected = Header {
            operation: Operation::AllReduce,
            epoch: 7,
            sequence: 3,
            message_bytes: 5 << 20,
            frame_bytes: 1 << 20,
        };
        assert_eq!(expected.check(&expected.encode(), 1), Ok(()));
        let others = [
            (Header { epoch: 6, ..expected }, "epoch 6 of the group, not 7"),
            (Header { sequence: 2, ..expected }, "frame 2, not 3"),
            (Header { operation: Operation::Barrier, ..expected }, "calls barrier and sends 5242880 bytes"),
            (Header { message_bytes: 8, ..expected }, "sends 8 bytes, not all-reduce and 5242880"),
            (Header { frame_bytes: 8, ..expected }, "a frame of 8 bytes, not 1048576"),
        ];
        for (other, sentence) in others {
            let error = expected.check(&other.encode(), 1).unwrap_err().to_string();
            assert!(error.contains(sentence), "{error}");
        }
        let error = expected.check(b"GET / HTTP/1.1\r\nHost: collective", 1).unwrap_err();
        assert!(error.to_string().contains("no frame"), "{error}");
    }
}
