//! Zstandard files as they are found: frames one after the other, with frames between them that hold no data.

use std::io::{self, BufRead, Chain, Cursor, Read};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// Memory that a frame may ask for: `zstd -19` wants 8 MiB, `--long` 128, `--ultra --long=31` is not for strangers' files.
const WINDOW_BYTES_MAX: u64 = 128 << 20;

/// First of the sixteen magic numbers of skippable frames (RFC 8878, 3.1.2).
const SKIPPABLE: u32 = 0x184D_2A50;

/// Reads what all frames of a file hold.
pub struct Frames<R: BufRead> {
    state: State<R>,
}

enum State<R: BufRead> {
    /// Between two frames.
    Between(R),
    Inside(Box<StreamingDecoder<Frame<R>, FrameDecoder>>),
    /// At the end of the file, or behind a failure.
    Ended,
}

/// A frame with its magic number, which was read to know what it is, and all that follows it.
type Frame<R> = Chain<Cursor<[u8; 4]>, R>;

// === impl Frames ===

impl<R: BufRead> Frames<R> {
    pub fn new(source: R) -> Self {
        Self { state: State::Between(source) }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.state = match std::mem::replace(&mut self.state, State::Ended) {
                State::Ended => return Ok(0),
                State::Between(source) => open_frame(source)?,
                State::Inside(mut decoder) => match decoder.read(buffer)? {
                    0 if !buffer.is_empty() => {
                        check_frame(&decoder.decoder)?;
                        State::Between(decoder.into_inner().into_inner().1)
                    }
                    read => {
                        self.state = State::Inside(decoder);
                        return Ok(read);
                    }
                },
            };
        }
    }
}

fn open_frame<R: BufRead>(mut source: R) -> io::Result<State<R>> {
    if source.fill_buf()?.is_empty() {
        return Ok(State::Ended);
    }
    let mut magic = [0; 4];
    source.read_exact(&mut magic)?;
    if u32::from_le_bytes(magic) & !0xf == SKIPPABLE {
        let mut length = [0; 4];
        source.read_exact(&mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        return match io::copy(&mut source.by_ref().take(length), &mut io::sink())? == length {
            true => Ok(State::Between(source)),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        };
    }
    let frame = Cursor::new(magic).chain(source);
    match StreamingDecoder::new_with_max_window_size(frame, WINDOW_BYTES_MAX) {
        Ok(decoder) => Ok(State::Inside(Box::new(decoder))),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
    }
}

/// Compares what was read with the checksum of its frame, if it has one.
fn check_frame(frame: &FrameDecoder) -> io::Result<()> {
    let checksums = frame.get_checksum_from_data().zip(frame.get_calculated_checksum());
    match checksums.is_some_and(|(written, read)| written != read) {
        true => Err(io::Error::new(io::ErrorKind::InvalidData, "a checksum is wrong: the file is damaged")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Frames::new(bytes).read_to_end(&mut content).map(|_| content)
    }

    #[test]
    fn frames_one_after_the_other_are_one_file_and_skippable_ones_hold_nothing() {
        let frame = |text: &[u8]| compress_to_vec(text, CompressionLevel::Fastest);
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let file = [frame(b"one\n"), skippable.clone(), frame(b""), frame(b"two\n"), skippable].concat();
        assert_eq!(read(&file).unwrap(), b"one\ntwo\n");
        assert_eq!(read(b"").unwrap(), b"");
    }

    #[test]
    fn a_torn_or_rotten_file_is_an_error_and_no_short_file() {
        let text: Vec<u8> = (0..100_000_u32).flat_map(|number| number.to_le_bytes()).collect();
        let file = compress_to_vec(text.as_slice(), CompressionLevel::Fastest);
        assert_eq!(read(&file).unwrap(), text);
        for length in [1, 4, 9, file.len() / 2, file.len() - 1] {
            assert!(read(&file[..length]).is_err(), "{length} bytes of it");
        }
        let mut rotten = file.clone();
        rotten[file.len() / 2] ^= 1;
        assert!(read(&rotten).is_err());
        assert!(read(b"this is no compressed text").is_err());
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, b'a'];
        assert!(read(&skippable).is_err());
    }
}
