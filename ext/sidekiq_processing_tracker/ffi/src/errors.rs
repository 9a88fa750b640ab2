//! Errors on their way to Ruby. The classes are declared in lib/sidekiq/processing_tracker/errors.rb.

use magnus::{Error, ExceptionClass, Module, RModule, Ruby};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// The Ruby exception for an error of the core: the one place that knows which class is whose.
pub fn to_ruby(ruby: &Ruby, error: &processing_tracker_core::Error) -> Error {
    use processing_tracker_core::Error as Core;
    let class = match error {
        Core::Connection(_) | Core::Refused(_) => "ConnectionError",
        Core::Unfit(_) => "ConfigurationError",
        Core::Protocol { .. } => "ProtocolError",
        _ => "InternalError",
    };
    Error::new(class_named(ruby, class), error.to_string())
}

/// Runs what a Ruby method does. A panic becomes an `InternalError`: magnus would make it `fatal`, which no `rescue`
/// catches and which ends the process.
pub fn guard<T>(ruby: &Ruby, body: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".into());
        Err(Error::new(
            class_named(ruby, "InternalError"),
            format!("internal error: {text}"),
        ))
    })
}

fn class_named(ruby: &Ruby, name: &str) -> ExceptionClass {
    ruby.class_object()
        .const_get::<_, RModule>("Sidekiq")
        .and_then(|sidekiq| sidekiq.const_get::<_, RModule>("ProcessingTracker"))
        .and_then(|tracker| tracker.const_get(name))
        .unwrap_or_else(|_| ruby.exception_standard_error())
}
