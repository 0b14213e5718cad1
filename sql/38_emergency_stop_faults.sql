-- emergency_stop_faults(): what would keep a stop from working, or from lasting, if the caller made it now.
-- Returns  a sentence for each fault, none if there is none; a mere warning begins with "warning: "
-- Raises   nothing of its own
-- Locks    tables in ACCESS SHARE mode, for which it waits 10 ms at most; no rows. It also works on a standby
--
-- It reads the catalogs only, no rows of the tables, but for a table of states.

-- function_faults(caller, owner): functions that are missing, are not those that were installed, or that may not be
-- executed: those that the service calls by the caller, all of them by their owner. And columns that break one.
CREATE OR REPLACE FUNCTION function_faults(caller name, owner name)
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    IF to_regprocedure('installed_functions()') IS NULL THEN
        RETURN NEXT 'the installation is not complete: the list of the functions that were installed is missing';
        RETURN;
    END IF;
    RETURN QUERY
        WITH installed AS (
            SELECT i.key AS signature, split_part(i.key, '(', 1) AS name, i.value AS checksum,
                   to_regprocedure(i.key)::oid AS oid
            FROM jsonb_each_text(installed_functions()) i
        )
        SELECT format(f.fault, i.signature, caller, owner)
        FROM installed i
        LEFT JOIN pg_proc p ON p.oid = i.oid
        CROSS JOIN LATERAL (SELECT CASE
            WHEN i.oid IS NULL AND to_regproc(i.name) IS NULL THEN 'function %s is missing'
            WHEN i.oid IS NULL THEN 'function %s is missing: the one that is there has other arguments'
            WHEN encode(sha256(convert_to(concat_ws(
                ' ', p.prosrc, p.prosecdef, p.provolatile, p.proisstrict, p.proconfig), 'UTF8')), 'hex')
                IS DISTINCT FROM i.checksum THEN
                'function %s is not the one that was installed: it was changed since'
            WHEN NOT has_function_privilege(caller, i.oid, 'EXECUTE') AND i.name = ANY (
                '{emergency_stop_job,emergency_stop_jobs,emergency_stop_dry_run,emergency_stop_status,release_job,
                  runaway_jobs,get_job,list_executions,timeout_stuck_jobs,repair_stuck_jobs}') THEN
                'role %2$I may not execute function %1$s'
            WHEN NOT has_function_privilege(owner, i.oid, 'EXECUTE') THEN
                'role %3$I, which owns emergency_stop_job, may not execute function %1$s'
            END) AS f (fault)
        WHERE f.fault IS NOT NULL
        ORDER BY i.signature;
    RETURN QUERY
        -- PostgreSQL refuses a query in which a name can be that of a column and of a variable.
        SELECT DISTINCT format('column %s.%s has the name of a variable of these functions: expected another name',
                               a.attrelid::regclass, a.attname)
        FROM pg_attribute a
        JOIN jsonb_object_keys(installed_functions()) AS i (signature) ON a.attname ~ '^v_[a-z_]+$'
        JOIN pg_proc p ON p.oid = to_regprocedure(i.signature) AND p.prosrc ~ (E'\\m' || a.attname || E'\\M')
        WHERE a.attrelid IN (to_regclass('jobs'), to_regclass('executions'));
END;
$$;

-- constraint_faults(): constraints on one column alone, the status, that do not let it become failed: checks, and
-- foreign keys to a table of the states. Showing one locks its table, ACCESS SHARE; where another session keeps it from
-- that for 10 ms, no constraint is named.
CREATE OR REPLACE FUNCTION constraint_faults()
RETURNS SETOF text LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
SET lock_timeout = '10ms'
AS $$
DECLARE
    v_constraint record;
    v_allows     boolean;
BEGIN
    FOR v_constraint IN
        SELECT c.conname AS name, c.conrelid::regclass AS table_name, format_type(a.atttypid, a.atttypmod) AS type,
               CASE c.contype WHEN 'c' THEN pg_get_expr(c.conbin, c.conrelid)
                    ELSE format('EXISTS (SELECT FROM %s AS states WHERE states.%I = %s.status)',
                                c.confrelid::regclass, f.attname, c.conrelid::regclass) END AS expression
        FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'status' AND c.conkey = ARRAY[a.attnum]
        LEFT JOIN pg_attribute f ON f.attrelid = c.confrelid AND f.attnum = c.confkey[1]
        WHERE c.conrelid IN (to_regclass('jobs'), to_regclass('executions'))
          -- Of a table of states, only one that we may read.
          AND (c.contype = 'c' OR c.contype = 'f' AND has_table_privilege(c.confrelid, 'SELECT')
               AND NOT row_security_active(c.confrelid)
               AND has_schema_privilege((SELECT s.relnamespace FROM pg_class s WHERE s.oid = c.confrelid), 'USAGE'))
          AND pg_get_constraintdef(c.oid) NOT LIKE '%NOT ENFORCED'
        ORDER BY c.conname
    LOOP
        BEGIN
            -- PostgreSQL itself has written the expression. @plpgsql_check_options: security_warnings = off
            EXECUTE format('SELECT %s FROM (SELECT ''failed''::%s AS status) AS %s',
                           v_constraint.expression, v_constraint.type, v_constraint.table_name) INTO v_allows;
        EXCEPTION
            WHEN raise_exception OR data_exception OR integrity_constraint_violation
                 OR syntax_error_or_access_rule_violation THEN
                v_allows := false;  -- it calls a function of the application's, which refuses
        END;
        IF NOT v_allows THEN
            RETURN NEXT format('constraint %s on table %s forbids the status failed',
                               v_constraint.name, v_constraint.table_name);
        END IF;
    END LOOP;
EXCEPTION WHEN lock_not_available THEN
END;
$$;

CREATE OR REPLACE FUNCTION emergency_stop_faults()
RETURNS SETOF text LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    -- Who calls: inside this function current_user is its owner.
    v_caller CONSTANT name := COALESCE(NULLIF(current_setting('role'), 'none')::name, session_user);
    -- As whom a stop runs.
    v_owner  CONSTANT name := COALESCE((SELECT pg_get_userbyid(p.proowner) FROM pg_proc p
                                        WHERE p.oid = to_regproc('emergency_stop_job')), current_user);
BEGIN
    IF pg_is_in_recovery() THEN
        RETURN NEXT 'this server is a standby: nothing can be stopped here, only on the primary';
    ELSIF current_setting('transaction_read_only')::boolean THEN
        RETURN NEXT 'this database is read-only: nothing can be stopped here';
    END IF;
    RETURN QUERY
        WITH tables AS (
            SELECT t.name, to_regclass(t.name)::oid AS oid
            FROM unnest('{jobs,executions,emergency_stops,batch_changes}'::text[]) AS t (name)
        )
        SELECT format('table %s is missing', t.name) FROM tables t WHERE t.oid IS NULL
        UNION ALL
        SELECT format('role %I, which owns the functions, may not %s %s', v_owner, p.verb, t.name)
        FROM (VALUES ('jobs', 'SELECT', 'read table'), ('jobs', 'UPDATE', 'update table'),
                     ('executions', 'SELECT', 'read table'), ('executions', 'UPDATE', 'update table'),
                     ('emergency_stops', 'SELECT', 'read table'), ('emergency_stops', 'INSERT', 'add rows to table')
        ) AS p (name, privilege, verb)
        JOIN tables t USING (name)
        WHERE NOT has_table_privilege(v_owner, t.oid, p.privilege)
        UNION ALL
        -- The functions switch row_security off, which turns hidden rows into an error.
        SELECT format('row-level security on table %s hides rows from role %I, which owns the functions',
                      t.name, v_owner)
        FROM tables t
        JOIN pg_class c ON c.oid = t.oid AND c.relrowsecurity
        JOIN pg_roles r ON r.rolname = v_owner AND NOT r.rolsuper AND NOT r.rolbypassrls
        WHERE c.relforcerowsecurity OR NOT pg_has_role(v_owner, c.relowner, 'USAGE')
        UNION ALL
        SELECT u.* FROM unfit_tables() u
        UNION ALL
        SELECT m.fault FROM missing_parts() m WHERE m.fault IS NOT NULL
        UNION ALL
        SELECT 'session_replication_role is replica: the triggers of the guard do not fire'
        WHERE current_setting('session_replication_role') = 'replica'
        UNION ALL
        SELECT format('column %s.id has another type than it had at the installation: install again', f.table_name)
        FROM (VALUES ('to_job_id(text)', 'jobs'), ('to_execution_id(text)', 'executions')) AS f (signature, table_name)
        JOIN pg_proc p ON p.oid = to_regprocedure(f.signature)
        JOIN pg_attribute a ON a.attrelid = to_regclass(f.table_name) AND a.attname = 'id'
        WHERE a.atttypid <> p.prorettype
        UNION ALL
        SELECT f.* FROM function_faults(v_caller, v_owner) f
        UNION ALL
        SELECT f.* FROM constraint_faults() f
        UNION ALL
        SELECT format('warning: role %I, which owns the functions, may not %s: GRANT %s TO %1$I',
                      v_owner, n.what, n.role)
        FROM (VALUES
            ('pg_signal_backend', 'end the sessions of other roles, so that force does not work against them'),
            ('pg_read_all_stats', 'see what the sessions of other roles do, so that blocked_by says little of them, '
                                  'and force also ends those that have just begun')
        ) AS n (role, what)
        WHERE NOT pg_has_role(v_owner, n.role, 'USAGE')
        UNION ALL
        SELECT 'warning: no foreign key leads from executions.job_id to jobs, so executions can be added for jobs that '
               'do not exist'
        WHERE NOT EXISTS (
            SELECT
            FROM pg_constraint c
            JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname = 'job_id' AND a.attnum = ANY (c.conkey)
            WHERE c.conrelid = to_regclass('executions') AND c.confrelid = to_regclass('jobs'))
        UNION ALL
        SELECT format('warning: table %s is unlogged: a crash of the server empties it', t.name)
        FROM tables t JOIN pg_class c ON c.oid = t.oid AND c.relpersistence = 'u'
        UNION ALL
        -- What the last ANALYZE has met. To look at the rows themselves would take too long on some tables.
        SELECT format('warning: executions have the status %L, which is none of the six that a stop knows: '
                      'it leaves them alone', v.status)
        FROM pg_stats s, unnest(s.most_common_vals::text::text[]) AS v (status)
        WHERE s.schemaname = current_schema() AND s.tablename = 'executions' AND s.attname = 'status'
          AND v.status NOT IN ('pending', 'running', 'processing', 'completed', 'failed', 'cancelled');
END;
$$;
REVOKE ALL ON FUNCTION emergency_stop_faults() FROM PUBLIC;
COMMENT ON FUNCTION emergency_stop_faults() IS
    'What would keep a stop from working or from lasting: a sentence for each fault, none if there is none. A warning '
    'begins with "warning: ".';
