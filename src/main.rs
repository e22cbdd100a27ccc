//! The program `decnet-heartbeat`. Its code is the module `cli` of the library.

fn main() -> std::process::ExitCode {
    decnet_heartbeat::cli::main()
}
