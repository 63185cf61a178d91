//! Clients that stop reading. What waits for one of them holds a place here, blocks on a base worker and sessions on reward
//! workers; after a while it is given back, and whoever reads again hears how to go on.

use std::{
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::{FutureExt as _, Stream, StreamExt as _, task::AtomicWaker};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use uniarm_proto::Refusal;

/// Events that are dropped, with everything they hold, when nobody has asked for the next one for too long.
pub(crate) struct Watched<S> {
    state: Arc<Mutex<State<S>>>,
    unread: Arc<Unread>,
    /// The same, for the events to wake.
    waker: Waker,
    _watcher: AbortOnDropHandle<()>,
}

/// How long the next event has been left: a transport whose client does not read does not ask for it, or does not come
/// for it when it is here.
struct Unread {
    since: Mutex<Option<Instant>>,
    reader: AtomicWaker,
}

enum State<S> {
    Running(S),
    /// The client has yet to hear of it.
    Stalled,
    Over,
}

// === impl Watched ===

impl<S: Stream + Unpin + Send + 'static> Watched<S> {
    /// `on_stall` is called before the events are dropped.
    pub(crate) fn new(events: S, patience: Duration, on_stall: impl FnOnce() + Send + 'static) -> Self {
        let unread = Unread { since: Mutex::new(Some(Instant::now())), reader: AtomicWaker::new() };
        let (state, unread) = (Arc::new(Mutex::new(State::Running(events))), Arc::new(unread));
        let watcher = tokio::spawn(watch(Arc::downgrade(&state), Arc::clone(&unread), patience, on_stall));
        let waker = Waker::from(Arc::clone(&unread));
        Self { state, unread, waker, _watcher: AbortOnDropHandle::new(watcher) }
    }
}

impl<S, T> Stream for Watched<S>
where
    S: Stream<Item = Result<T, Status>> + Unpin,
{
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.state.lock();
        match &mut *state {
            State::Over => Poll::Ready(None),
            State::Stalled => {
                *state = State::Over;
                Poll::Ready(Some(Err(Refusal::client_stalled().into())))
            }
            State::Running(events) => {
                self.unread.reader.register(context.waker());
                *self.unread.since.lock() = None;
                let event = events.poll_next_unpin(&mut Context::from_waker(&self.waker));
                if matches!(event, Poll::Ready(Some(_))) {
                    self.unread.begin();
                }
                event
            }
        }
    }
}

// === impl Unread ===

impl Unread {
    fn begin(&self) {
        self.since.lock().get_or_insert_with(Instant::now);
    }
}

impl Wake for Unread {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.begin();
        self.reader.wake();
    }
}

/// Wakes when a stall would be over the limit, not with each event.
async fn watch<S: Stream + Unpin>(
    state: Weak<Mutex<State<S>>>,
    unread: Arc<Unread>,
    patience: Duration,
    on_stall: impl FnOnce(),
) {
    let mut wake = Instant::now() + patience;
    loop {
        sleep_until(wake).await;
        let Some(state) = state.upgrade() else { return };
        let mut state = state.lock();
        wake = unread.since.lock().unwrap_or_else(Instant::now) + patience;
        if wake <= Instant::now() {
            let State::Running(events) = &mut *state else { return };
            // All that is missing may be the end.
            let is_over = matches!(events.next().now_or_never(), Some(None));
            if !is_over {
                on_stall();
            }
            let next = if is_over { State::Over } else { State::Stalled };
            let held = std::mem::replace(&mut *state, next);
            drop(state);
            drop(held); // it takes locks of its own
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures_util::stream;
    use tokio::time::sleep;
    use uniarm_proto::refusal::cause_of;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Numbers, one a minute and a half; and whether they were dropped.
    fn numbers() -> (impl Stream<Item = Result<u32, Status>> + Unpin + Send, Weak<()>) {
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let next = |(number, held)| async move {
            sleep(PATIENCE * 3 / 2).await;
            Some((Ok(number), (number + 1, held)))
        };
        (Box::pin(stream::unfold((0, held), next)), weak)
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_keeps_its_stream_however_slow_it_is() {
        let (numbers, held) = numbers();
        let mut watched = Watched::new(numbers, PATIENCE, || panic!("it reads"));
        for number in 0..5 {
            assert_eq!(watched.next().await.unwrap().unwrap(), number);
            sleep(PATIENCE * 9 / 10).await;
        }
        drop(watched);
        assert_eq!(held.strong_count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_gives_everything_back_and_hears_so_when_it_does() {
        let stalled = Arc::new(AtomicBool::new(false));
        let (numbers, held) = numbers();
        let told = Arc::clone(&stalled);
        let mut watched = Watched::new(numbers, PATIENCE, move || told.store(true, Ordering::Relaxed));
        assert_eq!(watched.next().await.unwrap().unwrap(), 0);
        sleep(PATIENCE * 99 / 100).await;
        assert_eq!((held.strong_count(), stalled.load(Ordering::Relaxed)), (1, false));
        sleep(PATIENCE / 50).await;
        assert_eq!((held.strong_count(), stalled.load(Ordering::Relaxed)), (0, true));
        let status = watched.next().await.unwrap().unwrap_err();
        assert_eq!(cause_of(&status).as_deref(), Some("client_stalled"));
        assert!(watched.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_and_does_not_come_for_it_does_not_read_either() {
        let (numbers, held) = numbers();
        let mut watched = Watched::new(numbers, PATIENCE, || {});
        // As tonic does, which gathers what is here already.
        assert!(watched.next().now_or_never().is_none());
        sleep(PATIENCE * 3 / 2 + PATIENCE * 99 / 100).await;
        assert_eq!(held.strong_count(), 1, "there was nothing to come for");
        sleep(PATIENCE / 50).await;
        assert_eq!(held.strong_count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_the_last_event_late_hears_of_no_stall() {
        let events = stream::iter([Ok::<_, Status>(0)]);
        let mut watched = Watched::new(events, PATIENCE, || panic!("it is over"));
        assert_eq!(watched.next().await.unwrap().unwrap(), 0);
        sleep(PATIENCE * 3).await;
        assert!(watched.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_never_begins_to_read_gives_everything_back() {
        let (numbers, held) = numbers();
        let _watched = Watched::new(numbers, PATIENCE, || {});
        sleep(PATIENCE + Duration::from_millis(10)).await;
        assert_eq!(held.strong_count(), 0);
    }
}
