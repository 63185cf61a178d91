//! W3C trace context across processes: the current span into gRPC metadata, and a caller's span out of it.

use axum::http::HeaderMap;
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::metrics::TraceLabel;

/// A client interceptor that sends the caller's current span along with every request.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceInterceptor;

struct MetadataInjector<'a>(&'a mut MetadataMap);

struct MetadataExtractor<'a>(&'a MetadataMap);

struct HeaderExtractor<'a>(&'a HeaderMap);

/// Writes the current span's context into `metadata` as `traceparent` and `tracestate`.
/// Writes nothing when traces are off.
pub fn inject(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    TraceContextPropagator::new().inject_context(&context, &mut MetadataInjector(metadata));
}

/// The trace of a span, for exemplars; none where traces are off, or this one is not sampled.
pub fn label(span: &Span) -> Option<TraceLabel> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_sampled().then(|| TraceLabel { trace_id: context.trace_id().to_string() })
}

/// Makes the caller's span, as `metadata` names it, the parent of `span`. Does nothing when the
/// caller sent none. The gRPC server of this crate does it for every call; this is for messages
/// that carry a context of their own.
pub fn extract(metadata: &MetadataMap, span: &Span) {
    adopt(span, &MetadataExtractor(metadata));
}

/// As `extract`, from the headers of an HTTP request.
pub fn extract_headers(headers: &HeaderMap, span: &Span) {
    adopt(span, &HeaderExtractor(headers));
}

fn adopt(span: &Span, carrier: &dyn Extractor) {
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), carrier);
    if parent.span().span_context().is_valid() {
        // An error means that no layer exports this span: there is nothing to be the parent of.
        let _ = span.set_parent(parent);
    }
}

impl Interceptor for TraceInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        inject(request.metadata_mut());
        Ok(request)
    }
}

impl Injector for MetadataInjector<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) =
            (MetadataKey::from_bytes(key.as_bytes()), MetadataValue::try_from(value))
        {
            self.0.insert(key, value);
        }
    }
}

impl Extractor for MetadataExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        // The propagator asks for its two keys by name and never lists them.
        Vec::new()
    }
}

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}
