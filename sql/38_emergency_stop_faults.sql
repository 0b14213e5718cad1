-- emergency_stop_faults(): what would keep a stop from working, or from lasting, if the caller made it now.
-- Returns  a sentence for each fault, none if there is none; one that begins with "warning: " does not keep a stop from working
-- Raises   nothing of its own
-- Locks    nothing; it also works on a standby, and takes a few milliseconds at most
--
-- It reads the catalogs only, no rows of the tables.

-- function_faults(caller, owner): functions that are missing, are not those that were installed, or that may not be executed:
-- those that the service calls by the caller, all of them by their owner.
-- Returns  a sentence for each
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION function_faults(caller name, owner name)
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
DECLARE
    -- What the service calls; workers call confirm_stopped.
    v_called    CONSTANT name[] := '{emergency_stop_job,emergency_stop_jobs,emergency_stop_dry_run,emergency_stop_status,release_job,
                                     runaway_jobs,get_job,list_executions,timeout_stuck_jobs,repair_stuck_jobs}'::name[];
    v_installed jsonb;
    v_function  record;
BEGIN
    IF to_regprocedure('installed_functions()') IS NULL OR to_regprocedure('function_checksums(oid[])') IS NULL THEN
        RETURN NEXT 'the installation is not complete: the list of the functions that were installed is missing';
        RETURN;
    END IF;
    v_installed := installed_functions();
    RETURN QUERY
        SELECT format('function %s is missing', c.name)
        FROM unnest(v_called) AS c (name)
        WHERE NOT EXISTS (SELECT FROM jsonb_object_keys(v_installed) k WHERE k LIKE c.name || '(%');
    FOR v_function IN
        SELECT i.key AS signature, split_part(i.key, '(', 1) AS name, c.oid, c.checksum IS DISTINCT FROM i.value AS changed
        FROM jsonb_each_text(v_installed) i
        LEFT JOIN function_checksums(ARRAY(SELECT to_regprocedure(k)::oid FROM jsonb_object_keys(v_installed) k)) c
            ON c.oid = to_regprocedure(i.key)
        ORDER BY i.key
    LOOP
        IF v_function.oid IS NULL AND EXISTS (
            SELECT FROM pg_proc p
            WHERE p.pronamespace = to_regnamespace(quote_ident(current_schema())) AND p.proname = v_function.name
        ) THEN
            RETURN NEXT format('function %s is missing: the one that is there has other arguments', v_function.signature);
        ELSIF v_function.oid IS NULL THEN
            RETURN NEXT format('function %s is missing', v_function.signature);
        ELSIF v_function.changed THEN
            RETURN NEXT format('function %s is not the one that was installed: it was changed since', v_function.signature);
        ELSIF v_function.name = ANY (v_called) AND NOT has_function_privilege(caller, v_function.oid, 'EXECUTE') THEN
            RETURN NEXT format('role %I may not execute function %s', caller, v_function.signature);
        ELSIF NOT has_function_privilege(owner, v_function.oid, 'EXECUTE') THEN
            RETURN NEXT format('role %I, which owns emergency_stop_job, may not execute function %s', owner, v_function.signature);
        END IF;
    END LOOP;
END;
$$;
REVOKE ALL ON FUNCTION function_faults(name, name) FROM PUBLIC;
COMMENT ON FUNCTION function_faults(name, name) IS 'Which functions are missing, were changed, or may not be executed by their caller or their owner.';

-- table_faults(owner): what is wrong with the tables, if the functions run as this role.
-- Returns  a sentence for each
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION table_faults(owner name)
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
        WITH tables (name, oid) AS (
            SELECT t.name, to_regclass(t.name)::oid FROM unnest('{jobs,executions,emergency_stops,batch_changes}'::text[]) AS t (name)
        )
        SELECT format('table %s is missing', t.name) FROM tables t WHERE t.oid IS NULL
        UNION ALL
        SELECT format('role %I, which owns the functions, may not %s %s', owner, p.verb, p.table_name)
        FROM (VALUES ('jobs', 'SELECT', 'read table'), ('jobs', 'UPDATE', 'update table'), ('executions', 'SELECT', 'read table'),
                     ('executions', 'UPDATE', 'update table'), ('emergency_stops', 'SELECT', 'read table'),
                     ('emergency_stops', 'INSERT', 'add rows to table')) AS p (table_name, privilege, verb)
        JOIN tables t ON t.name = p.table_name AND NOT has_table_privilege(owner, t.oid, p.privilege)
        UNION ALL
        SELECT format('trigger %s on table %s is %s', w.name, w.table_name, CASE WHEN g.oid IS NULL THEN 'missing' ELSE 'disabled' END)
        FROM (VALUES ('guard_inserted_executions', 'executions', 'guard_inserted_executions()', 4, false),
                     ('guard_updated_execution', 'executions', 'guard_updated_execution()', 17, true),
                     ('guard_updated_job', 'jobs', 'guard_updated_job()', 17, true),
                     ('append_only', 'emergency_stops', 'keep_append_only()', 58, false),
                     ('append_only', 'batch_changes', 'keep_append_only()', 58, false)) AS w (name, table_name, function, type, has_when)
        JOIN tables t ON t.name = w.table_name AND t.oid IS NOT NULL
        LEFT JOIN pg_trigger g ON g.tgrelid = t.oid AND g.tgname = w.name AND g.tgfoid = to_regprocedure(w.function)
                               AND g.tgtype = w.type AND (g.tgqual IS NOT NULL) = w.has_when  -- it fires when it has to
        WHERE g.oid IS NULL OR g.tgenabled NOT IN ('O', 'A')
        UNION ALL
        -- The functions switch row_security off, which turns hidden rows into an error.
        SELECT format('row-level security on table %s hides rows from role %I, which owns the functions', t.name, owner)
        FROM tables t
        JOIN pg_class c ON c.oid = t.oid AND c.relrowsecurity
        JOIN pg_roles r ON r.rolname = owner AND NOT r.rolsuper AND NOT r.rolbypassrls
        WHERE c.relforcerowsecurity OR NOT pg_has_role(owner, c.relowner, 'USAGE')
        UNION ALL
        SELECT format('index %s is %s', w.name, CASE WHEN i.indexrelid IS NULL THEN 'missing' ELSE 'not valid' END)
        FROM (VALUES ('executions_job_id_unfinished_idx', 'executions'), ('executions_job_id_id_idx', 'executions'),
                     ('emergency_stops_job_id_id_idx', 'emergency_stops')) AS w (name, table_name)
        JOIN tables t ON t.name = w.table_name AND t.oid IS NOT NULL
        LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indexrelid = to_regclass(w.name)
        WHERE i.indisvalid IS NOT TRUE;
END;
$$;
REVOKE ALL ON FUNCTION table_faults(name) FROM PUBLIC;
COMMENT ON FUNCTION table_faults(name) IS 'What is wrong with the tables, their triggers, their indexes and the rights of the functions'' owner.';

-- constraint_faults(): constraints on one column alone, the status, that do not let it become failed.
-- Returns  a sentence for each; none where another session has locked a table, so that this cannot be found out now
-- Raises   nothing of its own, but for errors of rare classes in an expression of the application's
-- Locks    each table for a moment, ACCESS SHARE, as showing an expression does; it waits for 10 ms at most
CREATE OR REPLACE FUNCTION constraint_faults()
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
SET lock_timeout = '10ms'
AS $$
DECLARE
    v_check  record;
    v_allows boolean;
BEGIN
    FOR v_check IN
        SELECT c.conname AS name, r.relname AS table_name, pg_get_expr(c.conbin, c.conrelid) AS expression,
               format_type(a.atttypid, a.atttypmod) AS type
        FROM pg_constraint c
        JOIN pg_class r ON r.oid = c.conrelid
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'status' AND c.conkey = ARRAY[a.attnum]
        WHERE c.conrelid IN (to_regclass('jobs'), to_regclass('executions')) AND c.contype = 'c'
          AND pg_get_constraintdef(c.oid) NOT LIKE '%NOT ENFORCED'
        ORDER BY c.conname
    LOOP
        BEGIN
            -- PostgreSQL itself has written the expression. @plpgsql_check_options: security_warnings = off
            EXECUTE format('SELECT %s FROM (SELECT ''failed''::%s AS status) AS %I', v_check.expression, v_check.type, v_check.table_name)
            INTO v_allows;
        EXCEPTION WHEN raise_exception OR data_exception OR integrity_constraint_violation OR syntax_error_or_access_rule_violation THEN
            v_allows := false;  -- it calls a function of the application's, which refuses
        END;
        IF NOT v_allows THEN
            RETURN NEXT format('constraint %s on table %s forbids the status failed', v_check.name, v_check.table_name);
        END IF;
    END LOOP;
EXCEPTION WHEN lock_not_available THEN
END;
$$;
REVOKE ALL ON FUNCTION constraint_faults() FROM PUBLIC;
COMMENT ON FUNCTION constraint_faults() IS 'Which constraints on a status forbid failed.';

-- stop_warnings(owner): what makes a stop less than it could be, if the functions run as this role.
-- Returns  a sentence for each, which begins with "warning: "
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION stop_warnings(owner name)
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
        SELECT format('warning: role %I, which owns the functions, may not %s: GRANT %s TO %1$I', owner, n.what, n.role)
        FROM (VALUES ('pg_signal_backend', 'end the sessions of other roles, so that force does not work against them'),
                     ('pg_read_all_stats', 'see what the sessions of other roles do, so that blocked_by says little of them')) AS n (role, what)
        JOIN pg_roles r ON r.rolname = owner AND NOT r.rolsuper
        WHERE NOT pg_has_role(owner, n.role, 'USAGE')
        UNION ALL
        SELECT 'warning: no foreign key leads from executions.job_id to jobs, so executions can be added for jobs that do not exist'
        WHERE NOT EXISTS (
            SELECT
            FROM pg_constraint c
            JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'job_id' AND c.conkey = ARRAY[a.attnum]
            WHERE c.conrelid = to_regclass('executions') AND c.confrelid = to_regclass('jobs') AND c.contype = 'f')
        UNION ALL
        -- What the last ANALYZE has met. To look at the rows themselves would take too long on some tables.
        SELECT format('warning: executions have the status %L, which is none of the six that a stop knows: it leaves them alone', v.status)
        FROM pg_stats s, unnest(s.most_common_vals::text::text[]) AS v (status)
        WHERE s.schemaname = current_schema() AND s.tablename = 'executions' AND s.attname = 'status'
          AND v.status NOT IN ('pending', 'running', 'processing', 'completed', 'failed', 'cancelled');
END;
$$;
REVOKE ALL ON FUNCTION stop_warnings(name) FROM PUBLIC;
COMMENT ON FUNCTION stop_warnings(name) IS 'What makes a stop less than it could be, a warning each.';

CREATE OR REPLACE FUNCTION emergency_stop_faults()
RETURNS SETOF text LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    -- Who calls: inside this function current_user is its owner.
    v_caller CONSTANT name := COALESCE(NULLIF(current_setting('role'), 'none')::name, session_user);
    -- As whom a stop runs.
    v_owner  CONSTANT name := COALESCE((
        SELECT pg_get_userbyid(p.proowner) FROM pg_proc p
        WHERE p.pronamespace = to_regnamespace(quote_ident(current_schema())) AND p.proname = 'emergency_stop_job'
        LIMIT 1), current_user);
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN NEXT 'this server is a standby: nothing can be stopped here, only on the primary';
    ELSIF current_setting('transaction_read_only')::boolean THEN
        RETURN NEXT 'this database is read-only: nothing can be stopped here';
    END IF;
    RETURN QUERY SELECT f.* FROM function_faults(v_caller, v_owner) f;
    RETURN QUERY SELECT f.* FROM table_faults(v_owner) f;
    RETURN QUERY SELECT f.* FROM constraint_faults() f;
    RETURN QUERY SELECT f.* FROM stop_warnings(v_owner) f;
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_faults() FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_faults() IS
    'What would keep a stop from working or from lasting: a sentence for each fault, none if there is none. A warning begins with "warning: ".';
