//! `multipart/form-data` (RFC 7578), part by part and piece by piece: a file goes to disk as it comes, and memory does not
//! grow with it.

use std::time::Duration;

use axum::{
    body::{Body, BodyDataStream, Bytes},
    extract::Request,
    http::{StatusCode, header},
};
use futures_util::{Stream, StreamExt as _};

use super::{check_encoding, failure::Failure};

/// RFC 2046.
const BOUNDARY_BYTES_MAX: usize = 70;

/// Of one part: names, and what else clients say of a file.
const HEADER_BYTES_MAX: usize = 8 << 10;

/// Parts that a form of ours may have, many times over.
const PARTS_MAX: usize = 16;

/// Between two pieces of a body; one that dawdles longer holds a connection for nothing.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// A form that is being read.
pub(super) struct Multipart<S = BodyDataStream> {
    body: S,
    /// What has come and is not handed on.
    buffer: Vec<u8>,
    /// A line end, two hyphens and the boundary: what ends a part.
    delimiter: Vec<u8>,
    parts: usize,
}

/// What a part says of itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) filename: Option<String>,
}

// === impl Multipart ===

impl Multipart {
    /// # Errors
    /// When the request is no form.
    pub(super) fn of(request: Request<Body>) -> Result<Self, Failure> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or("");
        let boundary = kind
            .strip_prefix("multipart/form-data")
            .and_then(|rest| parameter(rest, "boundary"))
            .filter(|boundary| (1..=BOUNDARY_BYTES_MAX).contains(&boundary.len()));
        let Some(boundary) = boundary else {
            let message = format!("content-type: is {kind:?}, wants multipart/form-data with a boundary");
            return Err(Failure::at_the_door(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid_argument",
                message,
            ));
        };
        check_encoding(request.headers())?;
        Ok(Self::new(&boundary, request.into_body().into_data_stream()))
    }
}

impl<S, E> Multipart<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    fn new(boundary: &str, body: S) -> Self {
        // The first boundary stands at the very beginning: with this, it looks like all others.
        Self { body, buffer: b"\r\n".to_vec(), delimiter: format!("\r\n--{boundary}").into_bytes(), parts: 0 }
    }

    /// The next part; what is left of the one before is read over.
    pub(super) async fn next_part(&mut self) -> Result<Option<Part>, Failure> {
        while self.chunk().await?.is_some() {}
        self.parts += 1;
        if self.parts > PARTS_MAX {
            return Err(malformed(&format!("has more than {PARTS_MAX} parts")));
        }
        let end = self.delimiter.len() + 2;
        while self.buffer.len() < end {
            self.fill().await?;
        }
        if self.buffer[self.delimiter.len()..end] == *b"--" {
            return Ok(None);
        }
        let headers = loop {
            if let Some(length) = find(&self.buffer[self.delimiter.len()..], b"\r\n\r\n") {
                let end = self.delimiter.len() + length + 4;
                break self.buffer.drain(..end).skip(self.delimiter.len()).collect::<Vec<u8>>();
            }
            if self.buffer.len() > self.delimiter.len() + HEADER_BYTES_MAX {
                return Err(malformed(&format!(
                    "has a part with more than {HEADER_BYTES_MAX} bytes of headers"
                )));
            }
            self.fill().await?;
        };
        Part::of(&String::from_utf8_lossy(&headers)).map(Some)
    }

    /// The next piece of the part; none at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some(length) = find(&self.buffer, &self.delimiter) {
                return Ok((length > 0).then(|| self.buffer.drain(..length).collect()));
            }
            // The last bytes may be the first ones of a delimiter.
            let certain = self.buffer.len().saturating_sub(self.delimiter.len() - 1);
            if certain > 0 {
                return Ok(Some(self.buffer.drain(..certain).collect()));
            }
            self.fill().await?;
        }
    }

    /// A short part as a text.
    pub(super) async fn text(&mut self, name: &str, bytes_max: usize) -> Result<String, Failure> {
        let mut text = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            text.extend(chunk);
            if text.len() > bytes_max {
                return Err(malformed(&format!("has a {name} of more than {bytes_max} bytes")));
            }
        }
        String::from_utf8(text).map_err(|_| malformed(&format!("has a {name} that is no text")))
    }

    async fn fill(&mut self) -> Result<(), Failure> {
        match tokio::time::timeout(PIECE_TIMEOUT, self.body.next()).await {
            Ok(Some(Ok(bytes))) => {
                self.buffer.extend_from_slice(&bytes);
                Ok(())
            }
            Ok(Some(Err(_)) | None) => Err(malformed("broke off before its last boundary")),
            Err(_) => {
                let message = format!("nothing of the body came for {} s", PIECE_TIMEOUT.as_secs());
                Err(Failure::at_the_door(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message))
            }
        }
    }
}

// === impl Part ===

impl Part {
    fn of(headers: &str) -> Result<Self, Failure> {
        let disposition = headers.split("\r\n").find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-disposition").then_some(value.trim())
        });
        let rest = disposition.and_then(|disposition| disposition.strip_prefix("form-data"));
        let name = rest.and_then(|rest| parameter(rest, "name"));
        let name = name.ok_or_else(|| malformed("has a part without a name"))?;
        Ok(Self { name, filename: rest.and_then(|rest| parameter(rest, "filename")) })
    }
}

/// The value of `; name=value` or `; name="value"`.
pub(super) fn parameter(text: &str, name: &str) -> Option<String> {
    let mut rest = text;
    loop {
        rest = rest.trim_start().strip_prefix(';')?.trim_start();
        let (key, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            None => {
                let end = after.find(';').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
            Some(quoted) => {
                let mut value = String::new();
                let mut characters = quoted.char_indices();
                loop {
                    match characters.next()? {
                        (at, '"') => break (value, &quoted[at + 1..]),
                        (_, '\\') => value.push(characters.next()?.1),
                        (_, character) => value.push(character),
                    }
                }
            }
        };
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(value);
        }
        rest = after;
    }
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn malformed(what: &str) -> Failure {
    Failure::at_the_door(StatusCode::BAD_REQUEST, "invalid_argument", format!("body: {what}"))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream::iter;

    use super::*;

    const FORM: &str = "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
                        --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a \\\"b\\\"; c.jsonl\"\r\n\
                        Content-Type: text/plain\r\n\r\nline\r\n--\r\n--c\r\n\r\n\r\n--b\r\n\
                        Content-Disposition: form-data; filename=x; name=empty\r\n\r\n\r\n--b--\r\n";

    async fn read(form: &[u8], piece: usize) -> Result<Vec<(Part, String)>, Failure> {
        let pieces: Vec<_> = form.chunks(piece).map(Bytes::copy_from_slice).collect();
        let pieces = pieces.into_iter().map(Ok::<_, Infallible>);
        let mut multipart = Multipart::new("b", iter(pieces));
        let mut parts = Vec::new();
        while let Some(part) = multipart.next_part().await? {
            let text = multipart.text("part", 100).await?;
            parts.push((part, text));
        }
        Ok(parts)
    }

    #[tokio::test]
    async fn a_form_is_the_same_in_pieces_of_any_size() {
        let part = |name: &str, filename: Option<&str>| Part {
            name: name.to_owned(),
            filename: filename.map(str::to_owned),
        };
        let expected = [
            (part("purpose", None), "batch".to_owned()),
            (part("file", Some("a \"b\"; c.jsonl")), "line\r\n--\r\n--c\r\n\r\n".to_owned()),
            (part("empty", Some("x")), String::new()),
        ];
        for piece in 1..FORM.len() {
            assert_eq!(read(FORM.as_bytes(), piece).await.unwrap(), expected, "pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn a_form_that_breaks_off_or_never_ends_is_refused() {
        for end in 0..FORM.len() - 4 {
            read(&FORM.as_bytes()[..end], 5).await.unwrap_err();
        }
        let endless = format!("--b\r\n{}", "x".repeat(2 * HEADER_BYTES_MAX));
        read(endless.as_bytes(), 1000).await.unwrap_err();
        let nameless = FORM.replace("name=\"purpose\"", "nome=\"purpose\"");
        read(nameless.as_bytes(), 1000).await.unwrap_err();
        let many =
            "--b\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n".repeat(PARTS_MAX + 1) + "--b--";
        read(many.as_bytes(), 1000).await.unwrap_err();
    }
}
