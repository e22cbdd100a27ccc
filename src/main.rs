//! The program `decnet-heartbeat`: its command line lives in the library's `cli`, beside what it uses.

fn main() -> std::process::ExitCode {
    decnet_heartbeat::cli::main()
}
