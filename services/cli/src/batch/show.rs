//! What a batch shows of itself: a bar for people, events for programs.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::task::JoinHandle;
use uniarm_batch::Progress;

use crate::{
    client::EndpointArgs,
    status::{PoolLoad, pool_loads},
};

/// Events for programs, and questions to the routers about their pools.
const EVERY: Duration = Duration::from_secs(1);

pub struct Display {
    bar: ProgressBar,
    as_json: bool,
    began: Instant,
    last_event: Option<Instant>,
    loads: Arc<Mutex<Option<[PoolLoad; 2]>>>,
    asking: JoinHandle<()>,
}

// === impl Display ===

impl Display {
    pub fn new(as_json: bool, routers: &EndpointArgs) -> Self {
        let bar = if as_json { ProgressBar::hidden() } else { ProgressBar::new(0) };
        let template = "{bar:24} {pos}/{len} requests, {msg}{eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("it is a template"));
        let loads = Arc::new(Mutex::new(None));
        let asking = tokio::spawn(ask_loads(routers.clone(), Arc::clone(&loads)));
        Self { bar, as_json, began: Instant::now(), last_event: None, loads, asking }
    }

    pub fn show(&mut self, progress: &Progress) {
        if self.as_json {
            if self.last_event.is_none_or(|last| last.elapsed() >= EVERY) {
                self.last_event = Some(Instant::now());
                self.print_event("progress", progress);
            }
            return;
        }
        if self.last_event.is_none() {
            // What an earlier life answered says nothing about this one's speed.
            self.began = Instant::now();
            self.last_event = Some(self.began);
            self.bar.set_length(progress.requests);
            self.bar.set_position(progress.kept);
            self.bar.reset_eta();
        }
        self.bar.set_message(self.message(progress));
        self.bar.set_position(progress.done);
    }

    pub fn clear(&mut self) {
        self.asking.abort();
        self.bar.finish_and_clear();
    }

    pub fn end(&self, progress: &Progress, output: &Path) {
        if self.as_json {
            return self.print_event("end", progress);
        }
        let asked = progress.done - progress.kept;
        let seconds = self.began.elapsed().as_secs_f64();
        println!(
            "{}: {} requests, {} of them now in {seconds:.1} s ({:.1} requests/s, {:.1} tokens/s)",
            output.display(),
            progress.done,
            asked,
            asked as f64 / seconds.max(1e-9),
            self.speed(progress),
        );
    }

    fn speed(&self, progress: &Progress) -> f64 {
        progress.tokens as f64 / self.began.elapsed().as_secs_f64().max(1e-9)
    }

    fn message(&self, progress: &Progress) -> String {
        let mut message = format!("{:.0} tokens/s, {} in flight, ", self.speed(progress), progress.in_flight);
        if let Some([base, reward]) = self.loads() {
            message.push_str(&format!("base {base}, reward {reward}, "));
        }
        if progress.failed > 0 {
            message.push_str(&format!("{} failed, ", progress.failed));
        }
        if progress.refusals > 0 {
            message.push_str(&format!("{} repeated, ", progress.refusals));
        }
        message
    }

    fn print_event(&self, event: &str, progress: &Progress) {
        let [base, reward] = self.loads().unwrap_or_default();
        let pool = |load: PoolLoad| json!({ "under_way": load.under_way, "capacity": load.capacity });
        let mut object = json!({
            "event": event,
            "seconds": self.began.elapsed().as_secs_f64(),
            "tokens_per_second": self.speed(progress),
            "base": pool(base),
            "reward": pool(reward),
        });
        if let (Some(fields), Ok(serde_json::Value::Object(own))) =
            (object.as_object_mut(), serde_json::to_value(progress))
        {
            fields.extend(own);
        }
        println!("{object}");
    }

    fn loads(&self) -> Option<[PoolLoad; 2]> {
        *self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Routers that do not answer are asked again: the bar goes on with what it has.
async fn ask_loads(routers: EndpointArgs, loads: Arc<Mutex<Option<[PoolLoad; 2]>>>) {
    loop {
        if let Ok(asked) = pool_loads(&routers).await {
            *loads.lock().unwrap_or_else(PoisonError::into_inner) = Some(asked);
        }
        tokio::time::sleep(EVERY).await;
    }
}
