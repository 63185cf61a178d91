//! The playground: three files in the binary, and nothing from anywhere else.

use axum::{
    Router,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};

const HTML: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPTS: [(&str, &str); 5] = [
    ("/playground/main.js", include_str!("page/main.js")),
    ("/playground/api.js", include_str!("page/api.js")),
    ("/playground/preference.js", include_str!("page/preference.js")),
    ("/playground/answer.js", include_str!("page/answer.js")),
    ("/playground/sweep.js", include_str!("page/sweep.js")),
];

/// Nothing but this server's own files is ever asked for, and no text of a model can become a script.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let page = Router::new()
        .route("/", get(|| file("text/html; charset=utf-8", HTML)))
        .route("/playground/style.css", get(|| file("text/css; charset=utf-8", STYLE)));
    SCRIPTS.into_iter().fold(page, |page, (path, script)| {
        page.route(path, get(move || file("text/javascript; charset=utf-8", script)))
    })
}

async fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        // The files change with the binary, and only a question tells whether it is another one.
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}
