//! Who asks over HTTP: the header `authorization`, looked at before anything of a request is read.

use axum::{
    extract::{Request, State},
    http::{HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{Door, failure::Failure};

/// What a client that may not come in is told to send.
const CHALLENGE: HeaderValue = HeaderValue::from_static("Bearer realm=\"uniarm\"");

/// What everybody may see: the page, which asks for a key itself, what the API is, and whether anybody is there.
fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/health" | "/openapi.json") || path.starts_with("/playground/")
}

/// Gives the request its caller, or answers it.
pub(super) async fn identify(State(door): State<Door>, mut request: Request, next: Next) -> Response {
    if !is_open(request.uri().path()) {
        let authorization = request.headers().get(header::AUTHORIZATION);
        // What is no text is nobody's key.
        let authorization = authorization.map(|value| value.to_str().unwrap_or(""));
        match door.service.identify(authorization) {
            Ok(caller) => _ = request.extensions_mut().insert(caller),
            Err(refusal) => {
                let mut response = Failure::of_body(refusal).into_response();
                response.headers_mut().insert(header::WWW_AUTHENTICATE, CHALLENGE);
                return response;
            }
        }
    }
    next.run(request).await
}
