//! The Redis protocol of sidekiq-processing-tracker, without any Ruby in it.
