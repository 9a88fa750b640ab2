//! `Sidekiq::ProcessingTracker::Native`: the Ruby binding of processing-tracker-core.
use magnus::{Error, Ruby};

#[magnus::init(name = "native")]
fn init(_ruby: &Ruby) -> Result<(), Error> {
    Ok(())
}
