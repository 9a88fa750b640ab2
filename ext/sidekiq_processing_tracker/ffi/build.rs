//! Makes rb-sys' link flags and `cfg(ruby_*)` known to this crate.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    rb_sys_env::activate()?;
    Ok(())
}
