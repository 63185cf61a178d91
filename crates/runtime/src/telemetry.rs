//! Logs to stderr and, where an endpoint is given, traces to an OpenTelemetry collector.

use std::io::IsTerminal as _;
use std::time::Duration;

use axum::http::Uri;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tokio::runtime::Runtime;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer};

use crate::RuntimeError;

const THREAD_NAME: &str = "uniarm-telemetry";

/// The endpoint's standard environment variable, read where no endpoint is given.
const ENDPOINT_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// One export of a batch of spans; and the last one, when the process ends. A collector that is
/// away costs at most this long at exit.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3);

/// Spans of these crates are of no use to an operator, and those of the exporter's own connection would
/// be exported, which makes new ones.
const TRANSPORT_CRATES: [&str; 4] = ["h2", "hyper", "tonic", "tower"];

#[derive(Debug, Clone)]
pub struct TelemetryOptions {
    /// Name of this process in traces, such as "uniarm-router".
    pub service: String,
    pub log_format: LogFormat,
    /// Directives of tracing-subscriber's `EnvFilter`, such as "info,uniarm_base=debug".
    pub log_filter: String,
    /// gRPC address of an OTLP collector, such as "http://localhost:4317".
    /// `None`: `OTEL_EXPORTER_OTLP_ENDPOINT`, and where that is not set either, no traces.
    pub otlp_endpoint: Option<String>,
    /// Share of the traces begun here that are kept, 0 to 1. A caller's decision is followed.
    pub sample_ratio: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Keeps the exporter running. Dropping it sends what is left, waiting a few seconds at most.
#[must_use = "dropping the guard ends the export of traces"]
#[derive(Debug)]
pub struct TelemetryGuard {
    export: Option<Export>,
}

#[derive(Debug)]
struct Export {
    provider: SdkTracerProvider,
    /// The exporter's connection lives here: neither a busy engine nor the end of the caller's
    /// runtime holds it up. An `Option` because only an owned runtime can be shut down.
    runtime: Option<Runtime>,
}

impl Default for TelemetryOptions {
    fn default() -> Self {
        Self {
            service: "uniarm".to_owned(),
            log_format: LogFormat::Text,
            log_filter: "info".to_owned(),
            otlp_endpoint: None,
            sample_ratio: 1.0,
        }
    }
}

/// Installs the process's subscriber; it can be done once.
pub fn init(options: &TelemetryOptions) -> Result<TelemetryGuard, RuntimeError> {
    let filter = EnvFilter::try_new(&options.log_filter).map_err(|error| RuntimeError::LogFilter {
        filter: options.log_filter.clone(),
        reason: error.to_string(),
    })?;
    check_filter(&options.log_filter)?;
    let export = match endpoint(options)? {
        Some(endpoint) => Some(Export::start(&endpoint, options)?),
        None => None,
    };
    let spans = export.as_ref().map(|export| {
        tracing_opentelemetry::layer()
            .with_tracer(export.provider.tracer("uniarm"))
            .with_target(false)
            .with_filter(filter_fn(|metadata| !is_transport(metadata.target())))
    });
    tracing_subscriber::registry()
        .with(spans)
        .with(log_layer(options.log_format))
        .with(filter)
        .try_init()
        .map_err(|_| RuntimeError::SubscriberInstalled)?;
    Ok(TelemetryGuard { export })
}

impl Export {
    fn start(endpoint: &str, options: &TelemetryOptions) -> Result<Self, RuntimeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(THREAD_NAME)
            .enable_all()
            .build()
            .map_err(|source| RuntimeError::Thread { name: THREAD_NAME, source })?;
        let exporter = {
            // The channel spawns its worker on the runtime that is current when it is built.
            let _context = runtime.enter();
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).build()
        };
        let exporter = match exporter {
            Ok(exporter) => exporter,
            Err(error) => {
                // Dropping a runtime inside another one panics; this does not.
                runtime.shutdown_background();
                let (endpoint, reason) = (endpoint.to_owned(), error.to_string());
                return Err(RuntimeError::Exporter { endpoint, reason });
            }
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(options.sample_ratio))))
            .with_resource(
                Resource::builder()
                    .with_service_name(options.service.clone())
                    .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
                    .build(),
            )
            .build();
        Ok(Self { provider, runtime: Some(runtime) })
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not exported");
        }
        if let Some(runtime) = self.runtime.take() {
            // As above.
            runtime.shutdown_background();
        }
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        drop(self.export.take());
    }
}

/// A lone word that is no level is taken for a target's name, for whose sake all others fall silent.
fn check_filter(filter: &str) -> Result<(), RuntimeError> {
    let is_mistake = |word: &&str| {
        !word.is_empty() && !word.contains(['=', '[', ':', '_']) && word.parse::<LevelFilter>().is_err()
    };
    let Some(word) = filter.split(',').map(str::trim).find(is_mistake) else { return Ok(()) };
    let reason =
        format!("{word:?} is neither a level (error, warn, info, debug, trace, off) nor target=level");
    Err(RuntimeError::LogFilter { filter: filter.to_owned(), reason })
}

fn endpoint(options: &TelemetryOptions) -> Result<Option<String>, RuntimeError> {
    let given = options.otlp_endpoint.clone().or_else(|| std::env::var(ENDPOINT_VARIABLE).ok());
    let Some(endpoint) = given.filter(|endpoint| !endpoint.is_empty()) else { return Ok(None) };
    let uri = endpoint.parse::<Uri>().ok();
    // The exporter would say that it is no URI, and not what is wanted.
    if uri.is_none_or(|uri| uri.scheme().is_none() || uri.host().is_none_or(str::is_empty)) {
        let from =
            if options.otlp_endpoint.is_none() { format!(" ({ENDPOINT_VARIABLE})") } else { String::new() };
        let reason = "it is not of the form http://host:port".to_owned();
        return Err(RuntimeError::Exporter { endpoint: format!("{endpoint:?}{from}"), reason });
    }
    Ok(Some(endpoint))
}

fn is_transport(target: &str) -> bool {
    let name = target.split("::").next().unwrap_or(target);
    TRANSPORT_CRATES.iter().any(|transport| name.starts_with(transport))
}

fn log_layer<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_endpoint_that_is_none_is_an_error_inside_a_runtime_too() {
        for endpoint in ["localhost:4317", "http://", "https://127.0.0.1:4317"] {
            let error = Export::start(endpoint, &TelemetryOptions::default()).unwrap_err().to_string();
            assert!(error.contains(endpoint), "{error}");
        }
    }

    #[test]
    fn an_endpoint_without_scheme_or_host_is_refused_in_words() {
        let options = |endpoint: &str| TelemetryOptions {
            otlp_endpoint: Some(endpoint.to_owned()),
            ..TelemetryOptions::default()
        };
        for wrong in ["collector", "localhost:4317", "http://", "/v1/traces"] {
            let error = endpoint(&options(wrong)).unwrap_err().to_string();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("http://host:port"), "{error}");
        }
        assert_eq!(endpoint(&options("http://collector:4317")).unwrap().unwrap(), "http://collector:4317");
        assert_eq!(endpoint(&options("")).unwrap(), None);
    }

    #[test]
    fn a_filter_that_would_silence_everything_by_mistake_is_refused() {
        for right in ["info", "INFO, h2=debug", "", "uniarm_base", "off", "warn,process[generate]=info"] {
            assert!(check_filter(right).is_ok(), "{right}");
        }
        for wrong in ["nope", "info,inof", "verbose"] {
            let error = check_filter(wrong).unwrap_err().to_string();
            assert!(error.contains("neither a level"), "{error}");
        }
    }
}
