//! An engine with nothing before it.

use dormouse_agent_proto::Target;
use dormouse_mux::{Agent, both_ways};
use tokio::net::UnixListener;

/// The engine's own socket, as clients of this one see it: no relay, no lease, no sleep.
pub async fn serve(listener: UnixListener, agent: Agent) {
    while let Ok((mut client, _)) = listener.accept().await {
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Ok(mut engine) = agent.dial(Target::Engine).await {
                both_ways(&mut client, &mut engine).await;
            }
        });
    }
}
