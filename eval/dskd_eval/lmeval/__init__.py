"""Everything that touches lm-evaluation-harness, and every way around it; nothing else imports lm_eval."""
